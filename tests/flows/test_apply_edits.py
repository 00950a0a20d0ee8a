"""The main line."""

import time

import pytest

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_a(desk, make_edit, ask):
    t=time.time()
    desk.submit("a", *[make_edit(i) for i in range(5)])
    print('submit', time.time()-t); t=time.time()
    done = desk.apply()
    print('apply', time.time()-t); t=time.time()
    print(done)
    print(desk.live(), [ask(f"The home of {n}") for n in ("Anna Keller",)])
    print('ask', time.time()-t); t=time.time()
    done = desk.apply()
    print('apply', time.time()-t, done); t=time.time()
