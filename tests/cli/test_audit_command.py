"""What `iet-finetune audit` makes of its arguments before anything is loaded."""

import pytest

from iet_finetune import UserError
from iet_finetune.cli.audit_command import QUICK, audit_command


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {}),
        (["--quick"], QUICK),
        (["--quick", "--num_images", "9"], QUICK | {"num_images": "9"}),
        (["--quick", "--generated_dir", "x"], {"membership_images": "200", "generated_dir": "x"}),
    ],
)
def test_quick_sets_fewer_images_unless_they_are_given(monkeypatch, flags, expected):
    """The request for an audit is read no further."""

    def read_request(given):
        raise UserError(str(sorted(given.items())))

    monkeypatch.setattr("iet_finetune.audit.request.read_request", read_request)
    with pytest.raises(UserError) as read:
        audit_command(["--model", "m", *flags])
    assert str(read.value) == str(sorted({"model": "m", **expected}.items()))
