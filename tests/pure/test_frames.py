"""The server's protocol, cut into frames wherever the network cuts it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsfs.store.frames import ROOM, Control, Frames, Message, ProtocolError

SUBJECTS = st.sampled_from([b"a", b"$O.b.M.w6k=", b"_INBOX.abc.12", b"MSG"])
HEADERS = st.lists(st.sampled_from([b"Nats-Sequence: 12\r\n", b"A:\r\n", b"B: x: y\r\n"]), max_size=3).map(
    b"".join
)


def feed(cutter: Frames, stream: bytes, cuts: list[int]) -> list[Message | Control]:
    """What comes out when the stream arrives in pieces of these sizes, again and again."""
    found: list[Message | Control] = []
    at = turn = 0
    while at < len(stream):
        space = cutter.space()
        piece = stream[at : at + min(cuts[turn % len(cuts)], len(space))]
        space[: len(piece)] = piece
        space.release()
        cutter.received(len(piece))
        found += cutter
        at, turn = at + len(piece), turn + 1
    return found


@st.composite
def frames(draw: st.DrawFn) -> tuple[bytes, Message | Control]:
    """A frame as the server sends it, and what is to become of it."""
    kind = draw(st.sampled_from(["msg", "hmsg", "control"]))
    if kind == "control":
        verb = draw(st.sampled_from([b"PING", b"PONG", b"+OK", b"INFO", b"-ERR"]))
        text = (
            b"" if verb in (b"PING", b"PONG", b"+OK") else draw(st.sampled_from([b"{}", b"'No'", b"{" * 500]))
        )
        return verb + (b" " + text if text else b"") + b"\r\n", Control(verb, text)
    data = draw(st.binary(max_size=60) | st.sampled_from([b"\r\n" * 9, b"MSG a 1 3\r\n", bytes(3_000)]))
    to = draw(st.sampled_from([b"", b"_INBOX.x"]))
    reply = b" " + to if to else b""
    sid = draw(st.sampled_from([b"1", b"23"]))
    subject = draw(SUBJECTS)
    if kind == "msg":
        line = b"MSG %s %s%s %d\r\n" % (subject, sid, reply, len(data))
        return line + data + b"\r\n", Message(subject, b"", data, sid, to)
    block = (
        draw(st.sampled_from([b"NATS/1.0", b"NATS/1.0 404 No Messages"])) + b"\r\n" + draw(HEADERS) + b"\r\n"
    )
    sizes = (len(block), len(block) + len(data))
    line = b"HMSG %s %s%s %d %d\r\n" % (subject, sid, reply, *sizes)
    return line + block + data + b"\r\n", Message(subject, block, data, sid, to)


@given(st.lists(frames(), max_size=8), st.lists(st.integers(1, 100_000), min_size=1, max_size=4))
def test_frames_come_out_whatever_the_pieces(
    sent: list[tuple[bytes, Message | Control]], cuts: list[int]
) -> None:
    stream, wanted = b"".join(raw for raw, _ in sent), [frame for _, frame in sent]
    assert feed(Frames(), stream, cuts) == wanted


def test_a_message_longer_than_the_buffer() -> None:
    data = bytes(range(256)) * (3 * ROOM // 256)
    stream = b"MSG a 1 %d\r\n%s\r\nPING\r\n" % (len(data), data)
    assert feed(Frames(), stream, [len(stream)]) == [Message(b"a", b"", data), Control(b"PING", b"")]


@pytest.mark.parametrize(
    "line",
    [
        b"MSG a 1 x\r\n",
        b"MSG a 1\r\n",
        b"HMSG a 1 9 3\r\n",
        b"HMSG a 1 -1 3\r\n",
        b"HELLO\r\n",
        b"\r\n",
        b"x" * 70_000,
    ],
)
def test_what_is_no_frame(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        feed(Frames(), line, [len(line)])


def test_headers_of_a_reply() -> None:
    message = Message(b"a", b"NATS/1.0\r\nNats-Sequence: 12\r\nNats-Num-Pending:3\r\n\r\n", b"")
    assert (message.status, message.header(b"Nats-Sequence"), message.header(b"Nats-Num-Pending")) == (
        None,
        b"12",
        b"3",
    )
    assert message.header(b"Sequence") is None
    status = Message(b"a", b"NATS/1.0 404 No Messages\r\n\r\n", b"")
    assert (status.status, status.description) == (404, "No Messages")
    assert Message(b"a", b"", b"x").status is None
