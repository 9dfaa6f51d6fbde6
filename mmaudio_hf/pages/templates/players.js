// One player at a time, and a line over its spectrogram where it is.
const players = document.querySelectorAll("video, audio");
for (const player of players) {
  const head = player.parentElement.querySelector(".playhead");
  const follow = () => {
    head.style.display = "block";
    head.style.left = 100 * player.currentTime / player.duration + "%";
    if (!player.paused) requestAnimationFrame(follow);
  };
  player.addEventListener("play", () => {
    for (const other of players) if (other !== player) other.pause();
    follow();
  });
  player.addEventListener("seeked", follow);
}
