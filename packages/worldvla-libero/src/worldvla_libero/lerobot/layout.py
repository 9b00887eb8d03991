"""How a LeRobotDataset v3 is laid out: names of files and columns, as lerobot writes them."""

INFO_FILE = "meta/info.json"
STATS_FILE = "meta/stats.json"
TASKS_FILE = "meta/tasks.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

ACTION_KEY = "action"
STATE_KEY = "observation.state"
CAMERA_KEYS = {"agentview": "observation.images.image", "robot0_eye_in_hand": "observation.images.image2"}

FILES_PER_CHUNK = 1000
