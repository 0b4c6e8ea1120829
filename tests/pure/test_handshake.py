"""What is changed of the first answer to the kernel, and what is not."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from natsfs.handshake import AUTO_INVAL_DATA, HANDLE_KILLPRIV_V2, promises, with_promises

words = st.integers(0, 2**32 - 1)


def request(opcode: int, flags: int) -> bytes:
    header = struct.pack("=IIQQIIIHH", 104, opcode, 2, 0, 0, 0, 0, 0, 0)
    return header + struct.pack("=IIII", 7, 45, 131072, flags) + bytes(48)


def answer(error: int, flags: int) -> bytes:
    return struct.pack("=IiQ", 80, error, 2) + struct.pack("=IIII", 7, 36, 131072, flags) + bytes(48)


@given(words)
def test_only_what_the_kernel_knows_is_promised(flags: int) -> None:
    assert promises(request(26, flags)) == flags & HANDLE_KILLPRIV_V2
    assert promises(request(1, flags)) == 0
    assert promises(request(26, flags)[:48]) == 0


@given(words, words)
def test_the_answer_gets_the_flags_and_stays_as_it_is_otherwise(flags: int, more: int) -> None:
    assert with_promises(answer(0, flags), more) == answer(0, (flags | more) & ~AUTO_INVAL_DATA)


@given(words)
def test_a_refusal_stays_as_it_is(flags: int) -> None:
    assert with_promises(answer(-71, flags), HANDLE_KILLPRIV_V2) == answer(-71, flags)
    short = answer(0, flags)[:24]
    assert with_promises(short, HANDLE_KILLPRIV_V2) == short
