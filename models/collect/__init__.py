"""Making datasets: texts, tasks made of them, where to measure them, and the replays that do it."""
