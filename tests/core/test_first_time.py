"""What is made once and kept is timed apart from what each run does."""

import threading
import time

from memlaw.core.first_time import Stopwatch, each_time, once

A_WHILE = 0.02


def _waits():
    time.sleep(A_WHILE)


def test_only_what_is_done_once_is_counted():
    watch = Stopwatch()
    _waits()
    assert watch.once_s == 0
    with once():
        _waits()
    assert A_WHILE <= watch.once_s <= watch.wall_s - A_WHILE
    assert Stopwatch().once_s == 0


def test_a_part_of_what_is_timed_is_not_counted_twice():
    watch = Stopwatch()
    with once():
        with once():
            _waits()
        inner = watch.once_s
    assert inner == 0
    assert A_WHILE <= watch.once_s <= watch.wall_s


def test_what_fails_has_taken_its_time_and_what_other_data_make_anew_is_not_counted():
    watch = Stopwatch()
    try:
        with once():
            _waits()
            raise OSError
    except OSError:
        pass
    after = watch.once_s
    assert after >= A_WHILE
    with each_time(), once():
        _waits()
    with once() as done:
        _waits()
        done.kept = False
    assert watch.once_s == after
    with once():
        _waits()
    assert watch.once_s >= after + A_WHILE


def test_another_threads_work_is_its_own():
    watch, others = Stopwatch(), []

    def other():
        mine = Stopwatch()
        with once():
            _waits()
        others.append(mine.once_s)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert others[0] >= A_WHILE
    assert watch.once_s == 0
