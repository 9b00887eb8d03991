"""Where demonstrations come from: scripted experts, and replays of recorded ones, in the simulator."""
