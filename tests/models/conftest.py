"""Tests with a fixture ``kin`` run for every family in their module's ``KIN``."""


def pytest_generate_tests(metafunc):
    if "kin" in metafunc.fixturenames:
        unseen = getattr(metafunc.cls, "no_view", ()) if "view" in metafunc.function.__name__ else ()
        rows = {name: kin for name, kin in metafunc.module.KIN.items() if name not in unseen}
        metafunc.parametrize("kin", rows.values(), ids=rows)
