import pytest

from tokenmill.trainer.config import ScheduleSection
from tokenmill.trainer.schedule import learning_rate


def rates(steps, **section):
    return [learning_rate(step, steps, 2.0, ScheduleSection(**section)) for step in range(steps)]


def test_cosine_equals_torchs():
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=0.2)
    ours = rates(100, warmup=0.0, final=0.1)
    for rate in ours:
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        theirs.step()


def test_warmup_rises_linearly_to_the_peak():
    ours = rates(100, warmup=0.1)
    assert ours[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(ours) == ours[9] == 2.0
    assert ours[10:] == sorted(ours[10:], reverse=True)


def test_wsd_is_flat_and_then_straight():
    ours = rates(100, kind="wsd", warmup=0.1, decay=0.2, final=0.5)
    assert ours[10:81] == [2.0] * 71
    assert ours[81:] == pytest.approx([2.0 - 0.05 * (i + 1) for i in range(19)])


def test_constant_and_a_run_of_one_step():
    assert rates(7, kind="constant", warmup=0.0) == [2.0] * 7
    assert rates(1) == [2.0]
