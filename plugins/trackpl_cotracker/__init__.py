"""CoTracker as a `trackpl` method."""
