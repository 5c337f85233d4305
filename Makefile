proto:
	.venv/bin/python -m grpc_tools.protoc -I proto --python_out=proto --pyi_out=proto proto/sdapi/v1/*.proto
	PATH=.venv/bin:$$PATH .venv/bin/python -m grpc_tools.protoc -I proto --grpc_python_out=proto --mypy_grpc_out=proto proto/sdapi/v1/generation.proto
