"""Thresholds around the one that was used: what a replay gives, and where there is none."""

import math
from dataclasses import replace

import captions
import pytest

from lvspec.policy import AcceptancePolicy
from lvspec.reporting.page import replay_chart
from lvspec.reporting.replay import FACTORS, replay_thresholds
from lvspec.reporting.tokens import read_caption


def read(**changes):
    return read_caption(captions.result(**changes), "here")


def facts(policy):
    return {"policy": policy.to_dict(), "config": {"gamma": 4}}


FIXED = replace(AcceptancePolicy.lvspec(), anchor_threshold=0.06)


def test_the_policy_as_it_was_gives_what_was_recorded():
    found = replay_thresholds([read()], facts(FIXED)).points
    assert [point.factor for point in found] == [None, *FACTORS]
    ran = found[0]
    # The shift and the loose token are the two that are not the target's own, of ten behind the
    # first; the last pass ends with the sequence.
    assert ran.tau == pytest.approx(10 / 3) and ran.guessed == 0
    assert ran.agreement == pytest.approx(0.8) and ran.regret == pytest.approx(0.13)
    used = found[1 + FACTORS.index(1.0)]
    assert (used.tau, used.agreement, used.regret) == (ran.tau, ran.agreement, ran.regret)


def test_a_lower_threshold_is_stricter():
    points = replay_thresholds([read()], facts(FIXED)).points[1:]
    assert points[0].threshold == 0 and points[-1].threshold == math.inf
    assert points[0].tau < points[-1].tau
    assert points[0].agreement > points[-1].agreement
    taus = [point.tau for point in points]
    assert taus == sorted(taus)


def test_equal_points_are_drawn_once():
    chart = replay_chart(replay_thresholds([read()], facts(FIXED)))
    labels = [point.label for point in chart.points]
    assert labels[0] == "as it ran" and len(labels) < len(FACTORS)
    assert any(" to no gate" in label for label in labels)


@pytest.mark.parametrize(
    "changes, policy, message",
    [
        ({"traced": False}, FIXED, "there is no trace"),
        ({}, AcceptancePolicy.strict(), "the policy, strict, has no gate"),
        ({}, replace(FIXED, top_k=9), "more than the 5 best"),
    ],
)
def test_why_there_is_no_replay_is_said(changes, policy, message):
    found = replay_thresholds([read(**changes)], facts(policy))
    assert found.points == () and message in found.missing
    assert replay_chart(found) is None


def test_of_trees_and_without_a_policy_there_is_none():
    steps = [each.to_dict() for each in captions.STEPS]
    steps[0]["parents"] = [0, 0, 1, 2]
    assert "trees" in replay_thresholds([read(trace=steps)], facts(FIXED)).missing
    assert "does not say" in replay_thresholds([read()], {}).missing
    alone = read(stats={**captions.result()["stats"], "gamma": 0})
    assert "nothing was drafted" in replay_thresholds([alone], facts(FIXED)).missing
    sampled = facts(FIXED) | {"config": {"temperature": 0.7}}
    assert "the target sampled" in replay_thresholds([read()], sampled).missing
    strict = [{**each.to_dict(), "anchor_threshold": "-inf"} for each in captions.STEPS]
    assert "no threshold" in replay_thresholds([read(trace=strict)], facts(FIXED)).missing
