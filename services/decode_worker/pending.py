"""Requests whose constraint is being compiled: the scheduler does not know them yet."""

import asyncio
from collections.abc import Callable

from precast.errors import InvalidRequest, PrecastError
from precast.log import get_logger
from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.decode_worker.constraints.compiler import ConstraintCompiler
from services.decode_worker.constraints.grammar import Grammar
from services.decode_worker.constraints.matcher import Matcher
from services.decode_worker.engine.request import Request

log = get_logger(__name__)


class PendingRequests:
    def __init__(
        self,
        compiler: ConstraintCompiler,
        admit: Callable[[Request], None],
        code_of: Callable[[PrecastError], "pb.ErrorCode.ValueType"],
    ) -> None:
        """``admit`` takes a request once it can be constrained; it may raise PrecastError."""
        self._compiler = compiler
        self._admit = admit
        self._code_of = code_of
        self._requests: dict[str, Request] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def knows(self, request_id: str) -> bool:
        return request_id in self._requests

    def begin(self, request: Request, grammar: Grammar) -> None:
        self._requests[request.request_id] = request
        task = asyncio.create_task(self._place(request, grammar))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def abort(self, request_id: str) -> bool:
        """Whether the request was here. Its constraint is compiled all the same."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            request.finish(pb.FINISH_REASON_ABORTED, flush=False)
        return request is not None

    async def _place(self, request: Request, grammar: Grammar) -> None:
        try:
            matcher = await self._compiler.compile(grammar)
            if self._take(request):
                constrain(request, matcher)
                self._admit(request)
        except PrecastError as error:
            self._take(request)
            request.fail(self._code_of(error), str(error))
        except Exception as error:  # a defect costs its request, and not its end
            log.exception("a constraint could not be compiled", request_id=request.request_id)
            self._take(request)
            request.fail(pb.ERROR_CODE_INTERNAL, f"internal error ({type(error).__name__})")

    def _take(self, request: Request) -> bool:
        """Whether the request is still wanted: another one may have its id by now."""
        if self._requests.get(request.request_id) is not request:
            return False
        del self._requests[request.request_id]
        return True


def constrain(request: Request, matcher: Matcher) -> None:
    """The request's output, also what it begins with, follows the grammar. Raises InvalidRequest if
    it doesn't."""
    request.sequence.matcher = matcher
    for token in request.sequence.output:
        matcher.take(token)
    if matcher.error:
        raise InvalidRequest("resumed_token_ids don't follow the constraint")
