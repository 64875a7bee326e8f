"""Files that let servers and pipelines run an engine: Triton, DeepStream, ROS 2."""
