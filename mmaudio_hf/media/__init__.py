"""Reading media: video, audio, clips, audit, and synthesised example media."""
