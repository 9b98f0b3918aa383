"""The trackers of a step's metrics: terminal, TensorBoard, Prometheus, the Ray job."""
