"""What tests import of bench/."""

from bench_modules import modules_of_bench


def test_nothing_is_handed_on():
    """What the modules of one file have measured or replaced is not what those of the next find."""
    with modules_of_bench() as outer:
        mine = outer("measuring.timing")
        for _ in range(2):
            with modules_of_bench() as bench:
                row, timing = bench("pairs.row"), bench("measuring.timing")
                assert row.timing is timing is not mine
        assert outer("pairs.row").timing is outer("measuring.timing") is mine
