"""LocoTrack as a `trackpl` method."""
