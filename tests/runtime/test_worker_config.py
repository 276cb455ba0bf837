"""A config reaches the worker whole, and its token reaches nothing else."""

import os

import pytest

from turboserve.errors import ConfigError
from turboserve.runtime.worker_config import WorkerConfig, config_fd, read_config, worker_argv


def _config(**changes):
    return WorkerConfig(
        **{"worker_id": "w0", "worker_epoch": 3, "token": "ab" * 32, "controller_port": 1, "gateway_port": 2} | changes
    )


def test_round_trip_through_a_descriptor():
    config = _config(slots=4, recovery_every_chunks=7)
    fd = config_fd(config)
    assert os.get_inheritable(fd)
    assert read_config(fd) == config


def test_token_is_in_neither_repr_nor_command_line():
    config = _config()
    assert config.token not in repr(config)
    assert config.token not in " ".join(worker_argv(5))


@pytest.mark.parametrize("text", ["", "[]", '{"worker_id": "w0"}', '{"unknown": 1}'])
def test_bad_json_is_a_config_error(text):
    with pytest.raises(ConfigError):
        WorkerConfig.from_json(text)


@pytest.mark.parametrize("changes", [{"capacity": 0}, {"capacity": 99}, {"log_format": "xml"}, {"heartbeat_s": 0}])
def test_values_that_cannot_be_are_refused(changes):
    with pytest.raises(ConfigError):
        _config(**changes)
