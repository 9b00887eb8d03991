"""The client of policy servers against real servers in threads, whose messages are put together here by hand."""

import pickle
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from websockets.sync.server import serve

from worldvla_libero.evaluation.policy import Needs, Observation
from worldvla_libero.evaluation.rollout import rollout
from worldvla_libero.evaluation.websocket_policy import PolicyServerError, WebsocketPolicy, pack, unpack

FRAME = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
OBSERVATION = Observation((FRAME,), "turn on the stove", 0, wrist=FRAME[::-1].copy(), state=np.arange(8.0))


def array(values, dtype):
    values = np.asarray(values, dtype)
    return {
        b"__ndarray__": True,
        b"data": values.tobytes(),
        b"dtype": values.dtype.str,
        b"shape": list(values.shape),
    }


def chunk(length=10, width=7, dtype=np.float32, **more):
    actions = np.arange(length * width).reshape(length, width) / 100
    return msgpack.packb({"actions": array(actions, dtype), "server_timing": {"infer_ms": 1.5}, **more})


class Server:
    """Speaks openpi's protocol; what it is asked is kept, what it answers is up to the test."""

    def __init__(self, answer):
        self.answer = answer
        self.queries = []
        self.connections = 0
        self.headers = []
        self.url = ""

    def handle(self, connection):
        self.connections += 1
        self.headers.append(connection.request.headers.get("Authorization"))
        connection.send(msgpack.packb({"robot": "panda", "horizon": 10}))
        for message in connection:
            self.queries.append(message)
            self.answer(self, connection)


@contextmanager
def serving(answer, handle=None):
    server = Server(answer)
    with serve(handle or server.handle, "localhost", 0, max_size=None) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        server.url = f"ws://localhost:{listening.socket.getsockname()[1]}"
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()


def answering(message):
    return lambda server, connection: connection.send(message)


@pytest.mark.slow
def test_a_served_policy_drives_the_simulator(two_cameras):
    assert Needs.of(WebsocketPolicy("ws://localhost")).cameras == two_cameras.cameras
    with serving(answering(chunk())) as server, WebsocketPolicy(server.url, image_size=32) as policy:
        run = rollout(policy, two_cameras, max_steps=7)
        start = two_cameras.reset(0)
        assert policy.metadata == {"robot": "panda", "horizon": 10}
        assert run.query_steps == (0, 5)  # five of the ten actions are executed
        np.testing.assert_allclose(run.actions[:5], np.arange(35).reshape(5, 7) / 100, atol=1e-6)
        assert run.actions.dtype == np.float64
        first = msgpack.unpackb(server.queries[0])
        assert set(first) == {
            "observation/image",
            "observation/wrist_image",
            "observation/state",
            "prompt",
        }
        assert first["prompt"] == "open the middle drawer of the cabinet"
        for key, camera in (("image", "agentview"), ("wrist_image", "robot0_eye_in_hand")):
            sent = first[f"observation/{key}"]
            assert sent[b"dtype"] == "|u1"
            assert sent[b"shape"] == [32, 32, 3]
            pixels = np.frombuffer(sent[b"data"], np.uint8).reshape(32, 32, 3)
            assert abs(pixels.mean() - start.frames[camera].mean()) < 1
        state = first["observation/state"]
        assert (state[b"dtype"], state[b"shape"]) == ("<f8", [8])
        np.testing.assert_array_equal(np.frombuffer(state[b"data"]), two_cameras.proprioception)
        assert server.connections == 1


def test_images_are_sent_as_rendered_where_that_is_the_size():
    for size in (None, 64):
        with serving(answering(chunk())) as server, WebsocketPolicy(server.url, image_size=size) as policy:
            policy.act(OBSERVATION)
            np.testing.assert_array_equal(unpack(server.queries[0])["observation/image"], FRAME)


def test_a_key_is_sent_with_the_connection():
    with serving(answering(chunk())) as server, WebsocketPolicy(server.url, api_key="s3cret") as policy:
        policy.act(OBSERVATION)
    assert server.headers == ["Api-Key s3cret"]


def test_a_lost_connection_is_opened_once_more():
    def close_first(server, connection):
        if server.connections == 1 and len(server.queries) == 2:
            connection.close()
        else:
            connection.send(chunk())

    with serving(close_first) as server, WebsocketPolicy(server.url) as policy:
        for _ in range(3):
            assert policy.act(OBSERVATION).shape == (5, 7)
        assert server.connections == 2
        assert len(server.queries) == 4  # the second was asked twice


def test_a_server_that_is_restarted_between_queries_is_found_again():
    with serving(answering(chunk())) as server:
        policy = WebsocketPolicy(server.url)
        policy.act(OBSERVATION)
        policy._connection.socket.shutdown(socket.SHUT_RDWR)
        time.sleep(0.1)
        assert policy.act(OBSERVATION).shape == (5, 7)
        policy.close()


def test_a_connection_lost_twice_is_an_error():
    with serving(lambda server, connection: connection.close()) as server, WebsocketPolicy(server.url) as policy:
        with pytest.raises(PolicyServerError, match="closed the connection twice during one query"):
            policy.act(OBSERVATION)
        assert server.connections == 2


def test_the_traceback_of_a_failed_server_is_passed_on():
    def fail(server, connection):
        connection.send("Traceback …\nRuntimeError: out of memory\n")
        connection.close(1011)

    with serving(fail) as server, WebsocketPolicy(server.url) as policy:
        with pytest.raises(PolicyServerError, match=r"(?s)server at ws://.* failed: Traceback.*out of memory$"):
            policy.act(OBSERVATION)
        assert server.connections == 1  # a query that made it fail is not repeated
        server.answer = answering(chunk())
        assert policy.act(OBSERVATION).shape == (5, 7)


def test_a_late_answer_is_an_error_and_not_taken_for_the_next_one():
    def late(server, connection):
        if len(server.queries) == 1:
            time.sleep(0.5)
        connection.send(chunk(length=len(server.queries)))

    with serving(late) as server, WebsocketPolicy(server.url, timeout=0.2) as policy:
        with pytest.raises(PolicyServerError, match=r"gave no answer within 0.2 s"):
            policy.act(OBSERVATION)
        policy.timeout = 10
        assert policy.act(OBSERVATION).shape == (2, 7)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (msgpack.packb({"action": array(np.zeros((2, 7)), "f4")}), r"'actions' .* missing among \['action'\]"),
        (msgpack.packb({"actions": [[0.0] * 7]}), "'actions' .* is list; an array of floats needed"),
        (chunk(dtype=np.int64), "an array of floats needed"),
        (chunk(width=6), r"shape \(10, 6\); \(N, 7\) needed"),
        (chunk(length=0), r"shape \(0, 7\)"),
        (msgpack.packb([1, 2]), "sent a list; a map needed"),
        (b"\xc1", "sent 1 bytes that are no message of openpi's protocol"),
        *(
            (msgpack.packb({"actions": {**array([1.0], "f8"), b"dtype": kind}}), "no message .*allowed: numbers")
            for kind in ("|O", "(2,)f4,(", "f4,f4", b"f8", None, "<f8000")
        ),
        (msgpack.packb({"n": {b"__npgeneric__": True, b"data": 1000, b"dtype": "|i1"}}), "no message .*Overflow"),
        (msgpack.packb({"actions": {**array([1.0], "f8"), b"shape": [3]}}), "no message of openpi's protocol"),
    ],
)
def test_an_answer_without_actions_is_an_error(answer, message):
    with (
        serving(answering(answer)) as server,
        WebsocketPolicy(server.url) as policy,
        pytest.raises(PolicyServerError, match=message),
    ):
        policy.act(OBSERVATION)


def test_wider_actions_are_cut_and_short_chunks_taken_whole():
    with serving(answering(chunk(length=3, width=32))) as server, WebsocketPolicy(server.url) as policy:
        assert policy.act(OBSERVATION).tolist() == (np.float32(np.arange(96).reshape(3, 32) / 100))[:, :7].tolist()


def test_what_is_no_policy_server_is_named():
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        url = f"ws://localhost:{unused.getsockname()[1]}"
    with pytest.raises(PolicyServerError, match=f"no policy server at {url}: ConnectionRefusedError"):
        WebsocketPolicy(url).act(OBSERVATION)


@pytest.mark.parametrize(
    ("handle", "error"),
    [
        (lambda connection: connection.recv(), "TimeoutError"),
        (lambda connection: connection.close(), "ConnectionClosed"),
    ],
)
def test_a_server_that_does_not_describe_itself_is_no_policy_server(handle, error):
    with serving(None, handle) as server, pytest.raises(PolicyServerError, match=rf"no policy server .*: {error}"):
        WebsocketPolicy(server.url, connect_timeout=0.5).act(OBSERVATION)


@pytest.mark.parametrize("missing", ["wrist", "state"])
def test_an_observation_without_wrist_or_state_is_refused(missing):
    with pytest.raises(ValueError, match="needs a wrist image and the robot's state"):
        WebsocketPolicy("ws://localhost:1").act(replace(OBSERVATION, **{missing: None}))


def test_a_copy_opens_its_own_connection():
    with serving(answering(chunk())) as server, WebsocketPolicy(server.url) as policy:
        policy.act(OBSERVATION)
        with pickle.loads(pickle.dumps(policy)) as copy:
            copy.act(OBSERVATION)
            policy.act(OBSERVATION)
        assert server.connections == 2


def test_messages_survive_the_way_and_hold_numbers_only():
    message = {
        "a": np.arange(6, dtype="<i2").reshape(2, 3),
        "b": np.float32(1.5),
        "c": [1, "ü", None, {"d": True}],
    }
    restored = unpack(pack(message))
    np.testing.assert_array_equal(restored["a"], message["a"])
    assert restored["a"].dtype == np.int16
    assert isinstance(restored["b"], np.float32)
    assert restored["c"] == message["c"]
    with pytest.raises(TypeError, match="ndarray cannot be sent; allowed: arrays of numbers"):
        pack({"a": np.array([object()])})


@pytest.mark.parametrize("missing", ["msgpack", "websockets"])
def test_a_missing_package_is_told_with_its_remedy(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"needs {missing}; remedy: pip install 'worldvla-libero\[server\]'"):
        WebsocketPolicy("ws://localhost:8000")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "http://localhost"}, "is 'http://localhost'; allowed: ws://host:port"),
        ({"num_actions": 0}, "num_actions is 0; allowed: above 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"timeout": -1.0}, "timeout is -1.0"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        WebsocketPolicy(**{"url": "ws://localhost:8000", **change})
