"""TF32 is on where it is asked for, off where numbers must repeat, and torch itself can still read its flags."""

from collections.abc import Iterator

import pytest
import torch

from iet_finetune.audit.measures.pretrained import repeatable
from iet_finetune.environment import allow_tf32, uses_tf32, without_tf32

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The flags, as torch has them at first."""
    yield
    MATMUL.allow_tf32 = False
    CUDNN.allow_tf32 = True
    CUDNN.benchmark = CUDNN.deterministic = False


def test_torch_compile_can_still_ask_when_tf32_is_allowed():
    assert uses_tf32() == [False, True]
    allow_tf32()
    assert uses_tf32() == [True, True]
    # torch's compiler reads this one.
    assert torch.get_float32_matmul_precision() == "high"


def test_the_flags_can_be_read_when_somebody_has_mixed_torchs_old_and_new_ones():
    CUDNN.conv.fp32_precision = "ieee"
    with pytest.raises(RuntimeError, match="mix of the legacy and new"):
        _ = CUDNN.allow_tf32
    assert uses_tf32() == [False, False]


@pytest.mark.parametrize("allowed", [False, True])
def test_what_must_repeat_is_computed_without_tf32_and_the_flags_are_put_back(allowed):
    if allowed:
        allow_tf32()
    CUDNN.benchmark = True
    for _ in range(2):
        with repeatable():
            assert uses_tf32() == [False, False]
            assert CUDNN.rnn.fp32_precision == "ieee"
            assert (CUDNN.benchmark, CUDNN.deterministic) == (False, True)
        assert uses_tf32() == [allowed, True]
        assert (CUDNN.benchmark, CUDNN.deterministic) == (True, False)
        assert MATMUL.allow_tf32 == allowed
        assert CUDNN.allow_tf32


def test_the_flags_are_put_back_after_an_error():
    with pytest.raises(ZeroDivisionError), without_tf32():
        _ = 1 / 0
    assert uses_tf32() == [False, True]
