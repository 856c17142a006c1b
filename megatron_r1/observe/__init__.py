"""What a run leaves to look at: metrics, rollouts, live progress and the HTML report."""
