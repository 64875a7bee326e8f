"""Two forms of one model side by side: layers watched, outputs compared, golden inputs."""
