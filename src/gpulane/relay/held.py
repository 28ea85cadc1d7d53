"""Both ends of a HeldAnswer: the engine fills it at its own speed, clients read it at theirs."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from gpulane.errors import GpulaneError
from gpulane.relay.answer import AnswerGone, HeldAnswer
from gpulane.relay.client_watch import ClientGone, ClientWatch
from gpulane.relay.headers import HeaderRules
from gpulane.relay.http import CLIENT_GONE_STATUS, cut
from gpulane.relay.raw_response import RawResponse
from gpulane.wire import EngineResponse


async def hold(response: EngineResponse, answer: HeldAnswer) -> None:
    """Take an engine's answer in as fast as it comes; returns at its last byte, when the GPU is free.

    A failure is kept for the readers and raised.
    """
    answer.begin(response.status, response.headers, reason=response.reason)
    try:
        while chunk := await response.next_chunk():
            answer.write(chunk)
        answer.finish()
    except Exception as error:
        answer.fail(error)
        raise
    finally:
        # Cancelled: the readers must not wait for ever. Nothing happens to an answer that has ended.
        answer.fail(AnswerGone("nobody waits for the engine's answer any more"))
        await response.close()


async def send_held(
    request: web.Request,
    answer: HeldAnswer,
    *,
    rewrite: HeaderRules,
    added: Sequence[tuple[str, str]] = (),
) -> web.StreamResponse:
    """Wait for a held answer and send it from its beginning at the client's speed.

    Raises what the answer failed with before its head; later a failure cuts the connection. A client that
    leaves changes nothing for the answer or its other readers.
    """
    try:
        with ClientWatch(request):
            status, headers = await answer.wait_head()
            # An answer that is whole has a length, even if the engine gave none.
            length = answer.bytes_written if answer.is_finished else None
            passed = [*rewrite.for_client(headers), *added]
            sent = RawResponse(status=status, reason=answer.reason, raw_headers=passed, length=length)
            await sent.prepare(request)
            await _send_body(request, answer, sent)
            return sent
    except (ClientGone, ConnectionError):
        request.protocol.force_close()
        return web.Response(status=CLIENT_GONE_STATUS)


async def _send_body(request: web.Request, answer: HeldAnswer, sent: RawResponse) -> None:
    try:
        async for chunk in answer.chunks():
            await sent.write(chunk)
    except GpulaneError as error:
        cut(request, sent, error)
    else:
        await sent.write_eof()
