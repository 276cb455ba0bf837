"""The clairvoyant problem as an integer programme, solved by HiGHS: the check on `clairvoyant.py`.

Nothing of the layer argument is used here. Time is cut into equal slots; in each slot the model chooses how
many workers to request and how many ready ones to release, and pays for every worker between request and
release. Meant for small cases: about 200 slots and 20 workers solve in well under a second.

HiGHS: Huangfu and Hall, "Parallelizing the dual revised simplex method", 2018; the `solver` extra installs
it.
"""

from __future__ import annotations

import numpy as np

from turboserve.errors import ConfigError


def cheapest_slots(need: np.ndarray, *, delay_slots: int, free_slots: int = 0) -> int:
    """Least number of billed worker-slots that has `need[t]` workers ready in every slot t.

    `delay_slots`: slots between a request and readiness, billed. `free_slots`: the first slots (the
    warm-up) are not billed; the fleet may begin with any number of ready workers, as it may after a long
    warm-up.
    """
    try:
        import highspy
    except ImportError as missing:
        raise ConfigError(
            "the exact check needs HiGHS",
            expected="the package highspy",
            hint="pip install 'turboserve[solver]'",
        ) from missing
    slots = len(need)
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    inf = highspy.kHighsInf
    kinds = {"requested": 0, "released": 1, "ready": 2, "billed": 3}

    def column(kind: str, slot: int) -> int:
        return slot * len(kinds) + kinds[kind]

    for slot in range(slots):
        price = 0.0 if slot < free_slots else 1.0
        for kind in kinds:
            lower = float(need[slot]) if kind == "ready" else 0.0
            model.addVar(lower, inf)
            index = column(kind, slot)
            model.changeColCost(index, price if kind == "billed" else 0.0)
            model.changeColIntegrality(index, highspy.HighsVarType.kInteger)

    def equal_zero(terms: dict[int, float]) -> None:
        """Add the row: the sum of coefficient * variable is 0."""
        model.addRow(0.0, 0.0, len(terms), np.array(list(terms), np.int32), np.array(list(terms.values())))

    for slot in range(1, slots):
        # Releases act at the start of a slot; a request made at its start is ready delay_slots later.
        ready = {column("ready", slot): 1.0, column("ready", slot - 1): -1.0, column("released", slot): 1.0}
        if slot - delay_slots >= 0:
            ready[column("requested", slot - delay_slots)] = -1.0
        equal_zero(ready)
        billed = {column("billed", slot): 1.0, column("billed", slot - 1): -1.0}
        billed[column("released", slot)] = 1.0
        billed[column("requested", slot)] = -1.0
        equal_zero(billed)
    # Slot 0 is the free start: what is billed there is what is ready or was requested there.
    start = {column("billed", 0): 1.0, column("ready", 0): -1.0}
    if delay_slots > 0:
        start[column("requested", 0)] = -1.0
    equal_zero(start)
    model.run()
    if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        status = model.modelStatusToString(model.getModelStatus())
        raise ConfigError(f"HiGHS ended with {status}, not an optimum")
    return round(model.getInfo().objective_function_value)
