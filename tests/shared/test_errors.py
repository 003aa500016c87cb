"""What each error means outside: exit codes, HTTP status, whether to try again."""

import pickle

import pytest

from shared.errors import EditxError, MissingComponent, PermanentError, PoisonError, TransientError, UserError


def test_only_transient_errors_are_tried_again():
    assert TransientError("broker away").retryable
    assert not any(kind("x").retryable for kind in (EditxError, UserError, PermanentError, PoisonError))


def test_an_error_says_what_and_what_to_do():
    error = UserError("in.wav is silent.", "Check the microphone.", "audio_silent", http_status=422)
    assert str(error) == "in.wav is silent. Check the microphone."
    assert error.document() == {"code": "audio_silent", "message": "in.wav is silent.", "hint": "Check the microphone."}
    assert (error.exit_code, error.http_status) == (2, 422)


def test_a_missing_component_names_the_file():
    error = MissingComponent("the vocoder", "checkpoint/hift.pt")
    assert "checkpoint/hift.pt" in error.message
    assert error.http_status == 503
    assert error.hint


ERRORS = [UserError("a", "b", "c", http_status=413), MissingComponent("x", "y"), PoisonError("z")]


@pytest.mark.parametrize("error", ERRORS)
def test_errors_cross_process_borders_whole(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert vars(again) == vars(error)
    assert str(again) == str(error)
