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
    const card = player.closest("article"), button = card.querySelector(".switch");
    for (const other of players) if (other !== player) other.pause();
    for (const near of card.querySelectorAll("video, audio")) delete near.dataset.last;
    if (button) button.dataset.now = player.parentElement.querySelector("figcaption").firstChild.textContent;
    player.dataset.last = "1";
    follow();
  });
  player.addEventListener("seeked", follow);
}

// From one player of a card to the next, at the same position: what is compared is heard in turn.
for (const button of document.querySelectorAll(".switch")) {
  button.addEventListener("click", () => {
    const own = [...button.parentElement.querySelectorAll("video, audio")];
    const from = Math.max(0, own.findIndex((player) => player.dataset.last));
    const to = own[(from + 1) % own.length];
    to.currentTime = own[from].currentTime;
    delete own[from].dataset.last;
    to.dataset.last = "1";
    to.play();
  });
}
