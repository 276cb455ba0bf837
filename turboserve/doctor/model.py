"""Checks of what is to be served: the checkpoint, and, when asked, the bits that it makes on this machine."""

from __future__ import annotations

from turboserve.doctor.findings import Finding, failed, ok, warning
from turboserve.errors import TurboServeError


def check_checkpoint(model: str) -> Finding:
    """The model is there and its files say what it is; weights are not loaded."""
    from turboserve.model.registry import load_spec

    try:
        spec = load_spec(model)
    except TurboServeError as error:
        mend = error.hint or "turboserve models lists what can be served"
        return failed("checkpoint", error.message, error.expected or "a model", mend)
    except OSError as error:
        return failed("checkpoint", f"{error.filename or model}: {error.strerror}", "files we may read", "")
    return ok("checkpoint", f"{spec.name}: {spec.width}x{spec.height}, {spec.fps:g} frames/s, {spec.model_hash[:12]}")


def check_numerics(model: str, device: str) -> Finding:
    """Loads the model and looks whether a session gets the same bits packed as alone."""
    import torch

    from turboserve.model.registry import load_model
    from turboserve.runtime import numerics
    from turboserve.runtime.kv_pool import KvPool

    try:
        where = torch.device(device)
        numerics.set_up_determinism(where)
        loaded = load_model(model, device)
        found = numerics.check_numerics(loaded, KvPool(loaded.state_layout(), 4, where))
    except (TurboServeError, RuntimeError, OSError) as error:
        return failed("numerics", f"the model does not load: {error}", "a model that runs here", "")
    text = f"{found.numerics_id} on {found.device_class}"
    if not found.packed_equals_alone:
        expected = "the same bits packed as alone"
        return warning("numerics", f"{text}: packed rows differ from lone ones", expected, "passes run one by one")
    return ok("numerics", f"{text}: packed rows equal lone ones")
