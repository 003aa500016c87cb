"""The decoder service: audio tokens and a reference to a waveform, whole or in a stream."""
