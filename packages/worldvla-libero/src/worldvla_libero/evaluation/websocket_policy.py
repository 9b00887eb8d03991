"""A policy that runs elsewhere, behind a server that speaks openpi's protocol."""

from __future__ import annotations

import re
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from worldvla_libero.evaluation.policy import AGENTVIEW, WRIST, Observation
from worldvla_libero.simulator.simulator import Frame

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

_NUMBERS = re.compile(r"[<>|=]?[biuf]\d{1,2}")  # types of arrays that are understood
_MAX_BYTES = 64 * 2**20  # of an answer; chunks take a few KB


class PolicyServerError(RuntimeError):
    """The policy server cannot be reached, does not answer in time, fails, or answers with something else."""


class WebsocketPolicy:
    """A policy server such as openpi's `serve_policy.py`, asked over a websocket.

    Each query is one message: a msgpack map of `observation/image` and `observation/wrist_image`, both
    (S, S, 3) uint8 and turned like ours by 180°, `observation/state`, (8,) float64 as in `Observation`, and
    `prompt`. The answer is a map with `actions`, (N, 7) or wider, of which the first K of the first seven columns
    are executed. Right after the connection is opened, the server sends a map that describes it.

    The connection is opened by the first query, and once more when it is lost during one. Pickled, the policy goes
    without its connection and opens its own.

    Args:
        url: such as `ws://localhost:8000`, or `wss://…`.
        num_actions: K, at most; 5 as in openpi's LIBERO evaluation. Servers answer with more actions than that.
        image_size: S, to which images are scaled before they are sent; None to send them as rendered.
        api_key: sent as `Authorization: Api-Key …`.
        connect_timeout: seconds for the server to accept and to describe itself.
        timeout: seconds for an answer. The first may take minutes while the server compiles its model.

    Raises:
        ImportError: websockets or msgpack is not installed.
        ValueError: the address is none of a websocket, or a number is out of range.

    Source: https://github.com/Physical-Intelligence/openpi (examples/libero, packages/openpi-client), read 2026.
    """

    history_length = 1
    cameras = (AGENTVIEW, WRIST)
    uses_state = True

    def __init__(
        self,
        url: str,
        *,
        num_actions: int = 5,
        image_size: int | None = 224,
        api_key: str | None = None,
        connect_timeout: float = 10.0,
        timeout: float = 300.0,
    ) -> None:
        if not url.startswith(("ws://", "wss://")):
            raise ValueError(
                f"address of the policy server is {url!r}; allowed: ws://host:port or wss://host:port"
            )
        for name, value in (
            ("num_actions", num_actions),
            ("image_size", image_size),
            ("connect_timeout", connect_timeout),
            ("timeout", timeout),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; allowed: above 0")
        _check_installed()
        self.url = url
        self.num_actions = num_actions
        self.image_size = image_size
        self.connect_timeout = connect_timeout
        self.timeout = timeout
        self.identity = {"url": url, "num_actions": num_actions, "image_size": image_size}
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._connection: ClientConnection | None = None
        self._closing = ExitStack()
        self._metadata: dict[str, Any] = {}

    @property
    def metadata(self) -> dict[str, Any]:
        """What the server says about itself; opens the connection if need be.

        Raises:
            PolicyServerError: it cannot be reached, or does not speak the protocol.
        """
        self._connected()
        return self._metadata

    def act(self, observation: Observation) -> NDArray[np.float64]:
        """(K, 7) the first actions of the server's answer.

        Raises:
            PolicyServerError: the server cannot be reached, does not answer in time, fails, or answers with
                something else than actions.
            ValueError: the observation has no wrist image or no state.
        """
        if observation.wrist is None or observation.state is None:
            raise ValueError("an observation for a policy server needs a wrist image and the robot's state")
        answer = self._ask(
            {
                "observation/image": self._scaled(observation.images[-1]),
                "observation/wrist_image": self._scaled(observation.wrist),
                "observation/state": observation.state,
                "prompt": observation.instruction,
            }
        )
        actions = answer.get("actions")
        if not isinstance(actions, np.ndarray) or actions.dtype.kind != "f":
            kind = type(actions).__name__ if "actions" in answer else f"missing among {sorted(map(str, answer))}"
            raise PolicyServerError(f"'actions' of {self.url} is {kind}; an array of floats needed")
        if actions.ndim != 2 or not len(actions) or actions.shape[1] < 7:
            raise PolicyServerError(f"'actions' of {self.url} has shape {actions.shape}; (N, 7) needed")
        return actions[: self.num_actions, :7].astype(np.float64)

    def close(self) -> None:
        """Close the connection; may be called twice, and the next query opens another."""
        self._connection = None
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None, "_closing": ExitStack()}

    def _ask(self, query: dict[str, Any]) -> dict[str, Any]:
        from websockets.exceptions import ConnectionClosed

        message = pack(query)
        try:
            return self._exchange(message)
        except ConnectionClosed:
            self.close()  # it may have been idle for long, or the server was restarted
        try:
            return self._exchange(message)
        except ConnectionClosed as error:
            self.close()
            raise PolicyServerError(f"{self.url} closed the connection twice during one query: {error}") from error

    def _exchange(self, message: bytes) -> dict[str, Any]:
        connection = self._connected()
        connection.send(message)
        try:
            return _unpacked(connection.recv(self.timeout), self.url)
        except TimeoutError as error:
            self.close()  # or else the late answer would be taken for that to the next query
            raise PolicyServerError(f"{self.url} gave no answer within {self.timeout} s") from error
        except PolicyServerError:
            self.close()  # after an error, openpi's server closes it
            raise

    def _connected(self) -> ClientConnection:
        from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
        from websockets.sync.client import connect

        if self._connection is not None:
            return self._connection
        with ExitStack() as opened:
            try:
                # A server whose one thread is busy with the model answers no ping; `timeout` takes their place.
                connection = opened.enter_context(
                    connect(
                        self.url,
                        additional_headers=self._headers,
                        open_timeout=self.connect_timeout,
                        ping_interval=None,
                        compression=None,
                        max_size=_MAX_BYTES,
                    )
                )
                self._metadata = _unpacked(connection.recv(self.connect_timeout), self.url)
            except (OSError, InvalidHandshake, InvalidURI, ConnectionClosed) as error:
                raise PolicyServerError(
                    f"no policy server at {self.url}: {type(error).__name__}: {error}"
                ) from error
            self._closing = opened.pop_all()
        self._connection = connection
        return connection

    def _scaled(self, frame: Frame) -> Frame:
        if self.image_size is None or frame.shape[:2] == (self.image_size, self.image_size):
            return frame
        size = (self.image_size, self.image_size)  # frames are square, so nothing is padded
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))


def pack(message: Any) -> bytes:
    """Write maps, strings, numbers and NumPy arrays as msgpack, arrays as openpi does: type, shape and bytes.

    Raises:
        TypeError: something else is in it.
    """
    import msgpack

    return msgpack.packb(message, default=_packable)


def unpack(message: bytes) -> Any:
    """The inverse of `pack`; arrays are read-only. No code is run.

    Raises:
        ValueError: damaged, or an array of something else than numbers.
    """
    import msgpack

    return msgpack.unpackb(message, object_hook=_restored)


def _packable(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.kind not in "biuf":
        raise TypeError(
            f"{type(value).__name__} cannot be sent; allowed: arrays of numbers, numbers, strings, maps"
        )
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def _restored(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" not in value and b"__npgeneric__" not in value:
        return value
    name = value[b"dtype"]
    if not isinstance(name, str) or not _NUMBERS.fullmatch(name):  # NumPy would parse whatever stands there
        raise ValueError(f"array of type {name!r}; allowed: numbers, such as '<f4'")
    dtype = np.dtype(name)
    if b"__npgeneric__" in value:
        return dtype.type(value[b"data"])
    return np.frombuffer(value[b"data"], dtype).reshape(value[b"shape"])


def _unpacked(message: bytes | str, url: str) -> dict[str, Any]:
    if isinstance(message, str):  # what openpi's server sends of an exception, before it closes the connection
        raise PolicyServerError(f"the policy server at {url} failed: {message.strip()}")
    try:
        content = unpack(message)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise PolicyServerError(
            f"{url} sent {len(message)} bytes that are no message of openpi's protocol: {error!r}"
        ) from error
    if not isinstance(content, dict):
        raise PolicyServerError(f"{url} sent a {type(content).__name__}; a map needed")
    return content


def _check_installed() -> None:
    try:
        import msgpack  # noqa: F401
        import websockets  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(
            f"a policy server needs {error.name}; remedy: pip install 'worldvla-libero[server]'", name=error.name
        ) from error
