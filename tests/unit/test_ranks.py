"""What has to be gone before process groups are."""

import torch.distributed as dist

from moe_accel import ranks


def test_all_that_has_to_end_before_process_groups_is_called_whoever_came_first(monkeypatch):
    ended = []
    monkeypatch.setattr(ranks, "_endings", [])
    monkeypatch.setattr(dist, "destroy_process_group", lambda group=None: ended.append(("group", group)))

    def first(group):
        ended.append(("first", group))

    def second(group):
        ended.append(("second", group))

    for action in (first, second, first):
        ranks.before_groups_end(action)
    dist.destroy_process_group()
    assert ended == [("first", None), ("second", None), ("group", None)]
    dist.destroy_process_group("some")
    assert ended[3:] == [("first", "some"), ("second", "some"), ("group", "some")]
