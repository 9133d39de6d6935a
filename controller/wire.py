"""Reading requests so that one that does not parse is refused with the name of its bad field.

gRPC answers UNKNOWN where a deserialiser raises, and protobuf does not say which string was not UTF-8. So requests are
read by a function that returns :class:`Unreadable` instead, and the field is found with a twin of the message type that
takes strings as bytes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import (  # type: ignore[import-untyped]
    descriptor,
    descriptor_pb2,
    descriptor_pool,
    message,
    message_factory,
)

from controller.refusals import abort, bad_fields

_Field = descriptor_pb2.FieldDescriptorProto


@dataclass(frozen=True)
class Unreadable:
    """A request that does not parse: its bad fields and what is wrong with them; ``""`` stands for the whole."""

    violations: dict[str, str]


def add_service(service: Any, described: descriptor.ServiceDescriptor, server: grpc.aio.Server) -> None:
    """Serves ``service``'s methods on ``server``; like the generated function, but unreadable requests are refused.

    Unary and server-streaming methods only.
    """
    handlers = {method.name: _handler(getattr(service, method.name), method) for method in described.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(described.full_name, handlers),))


def _handler(serve: Callable[[Any, Any], Any], method: descriptor.MethodDescriptor) -> grpc.RpcMethodHandler:
    request_type = message_factory.GetMessageClass(method.input_type)
    response_type = message_factory.GetMessageClass(method.output_type)

    async def serve_stream(request: Any, context: Any) -> Any:
        if isinstance(request, Unreadable):
            await abort(context, bad_fields(request.violations).problem)
        async with contextlib.aclosing(serve(request, context)) as responses:
            async for response in responses:
                yield response

    async def serve_call(request: Any, context: Any) -> Any:
        if isinstance(request, Unreadable):
            await abort(context, bad_fields(request.violations).problem)
        return await serve(request, context)

    make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    return make(
        serve_stream if method.server_streaming else serve_call,
        request_deserializer=functools.partial(read, request_type),
        response_serializer=response_type.SerializeToString,
    )


def read(request_type: type[message.Message], data: bytes) -> message.Message | Unreadable:
    """Parses a request."""
    try:
        return request_type.FromString(data)
    except message.DecodeError:
        return Unreadable(find_bad_fields(request_type.DESCRIPTOR, data))


def find_bad_fields(described: descriptor.Descriptor, data: bytes) -> dict[str, str]:
    """Says which fields of a message that does not parse are to blame."""
    twin = _twin(described)()
    try:
        twin.ParseFromString(data)
    except message.DecodeError:
        return {"": f"{len(data)} bytes that are no {described.full_name} message"}
    bad = {path: _complaint(value) for path, value in _strings(twin, described) if not _is_utf8(value)}
    return bad or {"": f"{len(data)} bytes that are no {described.full_name} message"}


def _complaint(value: bytes) -> str:
    try:
        value.decode()
    except UnicodeDecodeError as error:
        return f"byte {value[error.start]:#04x} at byte offset {error.start} is not UTF-8; accepted: UTF-8 text"
    raise ValueError("the value is UTF-8")


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _strings(twin: Any, described: descriptor.Descriptor, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """Paths and bytes of all the strings set in a twin."""
    for field, value in twin.ListFields():
        original = described.fields_by_name[field.name]
        values = list(enumerate(value)) if field.is_repeated else [(-1, value)]
        for place, item in values:
            path = f"{prefix}{field.name}" + (f"[{place}]" if place >= 0 else "")
            if original.type == descriptor.FieldDescriptor.TYPE_STRING:
                yield path, item
            elif original.type == descriptor.FieldDescriptor.TYPE_MESSAGE:
                yield from _strings(item, original.message_type, f"{path}.")


@functools.cache
def _twin(described: descriptor.Descriptor) -> type[message.Message]:
    """The same message type with ``bytes`` for ``string`` throughout, in a pool of its own."""
    pool = descriptor_pool.DescriptorPool()
    added: set[str] = set()

    def add(file: descriptor.FileDescriptor) -> None:
        if file.name in added:
            return
        added.add(file.name)
        for needed in file.dependencies:
            add(needed)
        copy = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(copy)
        del copy.service[:]
        for kind in copy.message_type:
            _strings_to_bytes(kind)
        pool.Add(copy)

    add(described.file)
    twin: type[message.Message] = message_factory.GetMessageClass(pool.FindMessageTypeByName(described.full_name))
    return twin


def _strings_to_bytes(kind: descriptor_pb2.DescriptorProto) -> None:
    for field in kind.field:
        if field.type == _Field.TYPE_STRING:
            field.type = _Field.TYPE_BYTES
    for nested in kind.nested_type:
        _strings_to_bytes(nested)
