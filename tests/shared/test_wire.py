"""How calls and errors cross to a model server and back."""

import pytest

from shared.errors import PermanentError, UserError
from shared.inference.port import InferenceUnavailable, RequestCancelled
from shared.inference.wire import PRIORITY_LEVELS, Call, level_of, pack_error, unpack_error


def test_a_call_comes_back_as_it_was() -> None:
    call = Call(
        {"a": 1, "b": 0.5, "c": "x", "d": True}, streams=True, left_s=1.5, priority=3, trace={"traceparent": "0"}
    )
    assert Call.unpack(call.pack()) == call


@pytest.mark.parametrize(
    "error",
    [UserError("Wrong.", "Mend it.", "wrong"), InferenceUnavailable("Full."), RequestCancelled("Gone."),
     PermanentError('Odd "quotes" {and} braces.', "", "odd")],
)  # fmt: skip
def test_an_error_keeps_its_kind_code_and_hint_inside_a_servers_message(error: Exception) -> None:
    found = unpack_error(f"in ensemble 'x', Failed: {pack_error(error)} (and more)")
    assert type(found) is type(error)
    assert found is not None
    assert found.document() == error.document()  # type: ignore[attr-defined]


def test_an_error_that_nobody_foresaw_is_permanent_and_a_servers_own_message_is_none_of_ours() -> None:
    assert isinstance(unpack_error(pack_error(ValueError("x"))), PermanentError)
    assert unpack_error("Exceeds maximum queue size") is None
    assert unpack_error('{"class": broken') is None


def test_higher_priorities_go_first() -> None:
    levels = [level_of(priority) for priority in (-1, 0, 1, 5, 9, 50)]
    assert levels == [PRIORITY_LEVELS, PRIORITY_LEVELS, 9, 5, 1, 1]
