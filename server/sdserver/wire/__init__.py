"""The one door between the wire and the server: protobuf messages in, valid frozen values out, and back."""

from sdserver.wire.reading import request_id, to_request
from sdserver.wire.writing import from_engine, from_event, from_request, to_json

__all__ = ["from_engine", "from_event", "from_request", "request_id", "to_json", "to_request"]
