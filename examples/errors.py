"""Errors are named by what the caller does next."""

from sdclient import Client, InvalidRequestError, ServerBusyError, UnavailableError

with Client("localhost:50051") as client:
    try:
        client.generate("a lake", width=0, steps=0)
    except InvalidRequestError as error:
        for field, problem in error.violations.items():
            print(f"{field}: {problem}")
    except ServerBusyError as error:
        print(f"come back in {error.retry_after} s")
    except UnavailableError as error:
        print(error)
