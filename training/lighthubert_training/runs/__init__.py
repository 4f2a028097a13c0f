"""What every run needs: options, files, checkpoints, logs, processes, the Hub, and errors for people."""
