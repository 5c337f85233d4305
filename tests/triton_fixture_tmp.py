import pytest
class P:
    grpc_port = 9301
    pid = 0
@pytest.fixture(scope="session")
def triton(): return P()
