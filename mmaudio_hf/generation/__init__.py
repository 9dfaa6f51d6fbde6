"""Generation of audio from video, images and text."""
