import av
import numpy as np
import pytest

from worldvla_libero.video import FrameError, VideoWriter


def _ramp(i: int, height: int = 64, width: int = 96) -> np.ndarray:
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:, :, 0] = np.linspace(0, 255, width)
    frame[:, :, 1] = 40 * i
    return frame


def _decode(path):
    """Codec, pixel format and rate of a video, and its frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate, frames


def test_video_comes_back(tmp_path):
    path = tmp_path / "videos" / "rollout.mp4"
    with VideoWriter(path, fps=20) as video:
        for i in range(5):
            video.write(_ramp(i))
        assert not path.exists()  # only whole
    codec, pixels, rate, frames = _decode(path)
    assert (codec, pixels, rate) == ("h264", "yuv420p", 20)
    assert len(frames) == 5
    for i, frame in enumerate(frames):
        assert np.abs(frame.astype(int) - _ramp(i)).mean() < 4  # lossy, but this frame and no other
    assert [file.name for file in path.parent.iterdir()] == ["rollout.mp4"]


def test_odd_sizes_gain_a_row_and_fractions_of_frames_a_second_are_kept(tmp_path):
    with VideoWriter(tmp_path / "odd.mp4", fps=20 / 3) as video:
        video.write(_ramp(1, 63, 95))
    _, _, rate, frames = _decode(tmp_path / "odd.mp4")
    assert frames[0].shape == (64, 96, 3)
    assert rate == pytest.approx(20 / 3)


def test_half_a_video_does_not_stay(tmp_path):
    def interrupted():
        with VideoWriter(tmp_path / "half.mp4", fps=20) as video:
            video.write(_ramp(0))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    with VideoWriter(tmp_path / "empty.mp4", fps=20):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_video_that_cannot_be_written_says_so_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"), VideoWriter(tmp_path / "file" / "v.mp4", fps=20) as video:
        video.write(_ramp(0))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("frame", [_ramp(0).astype(np.float32), _ramp(0)[..., 0], _ramp(0)[:0], _ramp(0, 32, 32)])
def test_frames_that_do_not_fit_are_refused(tmp_path, frame):
    with VideoWriter(tmp_path / "v.mp4", fps=20) as video:
        video.write(_ramp(0))
        with pytest.raises(FrameError, match="frame has shape"):
            video.write(frame)
    assert len(_decode(tmp_path / "v.mp4")[-1]) == 1
