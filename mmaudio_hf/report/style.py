"""Looks of the report, and its players."""

STYLE = """
:root { color-scheme: light dark; --back: #fbfaf7; --card: #fff; --text: #1d1c1a; --soft: #6a6862; --line: #dedbd3;
  --a: #9a968c; --b: #1f6fb2; --c: #c2471d; }
@media (prefers-color-scheme: dark) { :root { --back: #161617; --card: #202022; --text: #eceae4; --soft: #a3a098;
  --line: #3a393a; --a: #8d8a83; --b: #6cb2ee; --c: #f0895f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 34px 0 12px; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
.kind, .note { color: var(--soft); font-size: .875rem; margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 160px), 1fr)); gap: 12px; margin: 0; }
.tiles > div, .charts > figure, article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tiles > div { padding: 10px 14px; }
dt { color: var(--soft); font-size: .875rem; }
dd { margin: 0; font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
dd .note { display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 12px; }
figure { margin: 0; min-width: 0; }
.charts > figure { padding: 12px; }
figcaption { font-weight: 600; font-size: .9375rem; margin-bottom: 6px; }
figcaption .note { font-weight: 400; margin-left: 10px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); fill: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.thin { stroke-width: 1.3; }
.dashed { stroke-dasharray: 5 4; }
.line.a { stroke: var(--a); } .line.b { stroke: var(--b); } .line.c { stroke: var(--c); }
.dot.a { fill: var(--a); } .dot.b { fill: var(--b); } .dot.c { fill: var(--c); }
.keys { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 6px 0 0;
  padding: 0; font-size: .8125rem; }
.keys li::before { content: ""; display: inline-block; width: 18px; margin-right: 6px; vertical-align: middle;
  border-top: 3px solid; }
.keys li.dashed::before { border-top-style: dashed; }
.keys .a::before { border-color: var(--a); } .keys .b::before { border-color: var(--b); }
.keys .c::before { border-color: var(--c); }
.marks { margin-bottom: 12px; }
.key { display: inline-block; vertical-align: middle; background: #17152a; width: 18px; height: 18px;
  position: relative; }
article { padding: 14px; margin-bottom: 14px; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px;
  margin-top: 10px; }
.narrow { grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); }
video, audio { display: block; width: 100%; margin-bottom: 8px; }
video { max-height: 330px; background: #000; border-radius: 4px; }
.spectrogram { position: relative; height: 130px; overflow: hidden; border-radius: 4px; background: #0c0a1e; }
.spectrogram img { position: absolute; width: 100%; height: 100%; }
i.event, i.onset, .playhead, .key::before { position: absolute; content: ""; }
i.event, .key.event::before { top: 0; bottom: 0; border-left: 1px dashed #fff; opacity: .8; }
.key::before { left: 8px; }
i.onset, .key.onset::before { bottom: 0; border: 5px solid transparent; border-top-width: 0;
  border-bottom: 9px solid #5ff0d8; }
i.onset, .key.onset::before { margin-left: -5px; }
.key.onset::before { left: 9px; }
.playhead { display: none; top: 0; bottom: 0; width: 2px; background: #5ff0d8; }
.seconds { position: relative; height: 20px; font-size: .75rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.seconds span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.seconds span:first-child { transform: none; }
.wide { margin: 12px 0; overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.scores { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.scores th, .scores td { padding: 8px 14px; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
.scores tbody tr:last-child > * { border-bottom: 0; }
.scores th { font-weight: 600; }
.scores .note { display: block; font-weight: 400; }
.scores .best { font-weight: 700; color: var(--b); }
"""

# One player at a time, and a line over its spectrogram where it is.
SCRIPT = """
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
"""
