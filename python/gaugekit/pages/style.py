"""The style sheet of the report pages: light and dark, one column on a phone, two on a desk, printable.

Series colours are Okabe and Ito's blue and orange, lighter on dark ground, told apart by every common kind of
colour vision; dashes and marks repeat what colour says. Text keeps a contrast of 4.5 to 1 or more.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #fff; --ink: #1c2326; --soft: #566267; --rule: #dfe2df; --grid: #eceeec;
  --ours: #0072b2; --other: #8d979b; --alt: #c05f00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181a; --card: #1b2023; --ink: #e8ebea; --soft: #a9b3b6; --rule: #323a3e; --grid: #293033;
    --ours: #56b4e9; --other: #8b969a; --alt: #f0a73c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 400 17px/1.6 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 64px 32px 80px; }
h1, h2 {
  font-family: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia, serif;
  font-weight: 600; text-wrap: balance;
}
h1 { font-size: clamp(30px, 5vw, 48px); line-height: 1.12; letter-spacing: -.015em; margin: 10px 0 18px; }
h1 .name { white-space: nowrap; }
h2 { font-size: 27px; line-height: 1.2; margin: 0 0 10px; }
h3 { font-size: 16px; line-height: 1.35; font-weight: 650; margin: 0 0 14px; }
p { margin: 0 0 14px; max-width: 44em; }
.eyebrow { color: var(--soft); font-size: 13px; letter-spacing: .08em; text-transform: uppercase; margin: 0; }
.lead { font-size: 19px; line-height: 1.55; color: var(--soft); }
.lead strong { color: var(--ink); font-weight: 600; }
.next { margin-top: 32px; }
.note { margin-top: 12px; color: var(--soft); font-size: 14.5px; }
section { margin-top: 64px; }
.strip {
  display: grid; grid-template-columns: repeat(4, 1fr); gap: 1px; margin: 36px 0 0; background: var(--rule);
  border: 1px solid var(--rule); border-radius: 10px; overflow: hidden;
}
.strip div { background: var(--card); padding: 20px 20px 18px; }
.strip dt { font-size: 14.5px; line-height: 1.35; }
.strip dd {
  margin: 0 0 6px; font-size: 29px; line-height: 1.15; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; white-space: nowrap;
}
.strip .why { display: block; color: var(--soft); font-size: 13px; line-height: 1.4; margin-top: 5px; }
.pair {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 24px;
  margin-top: 24px;
}
figure {
  margin: 0; min-width: 0; padding: 20px 22px 18px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px;
}
figcaption { color: var(--soft); font-size: 14.5px; line-height: 1.5; margin-top: 14px; max-width: 62em; }
.panels {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 14px 18px;
}
svg { display: block; width: 100%; max-width: 520px; height: auto; overflow: visible; }
.key { margin-bottom: 10px; }
.panels svg { max-width: 340px; }
pre {
  margin: 0 0 14px; padding: 16px 18px; max-width: 46em; overflow-x: auto; background: var(--card);
  border: 1px solid var(--rule); border-radius: 10px; line-height: 1.7;
}
svg text {
  font: 12px system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: var(--soft);
  font-variant-numeric: tabular-nums;
}
svg .label, svg .value, svg .heading { fill: var(--ink); }
svg .heading { font-weight: 650; }
svg .middle { text-anchor: middle; }
svg .end { text-anchor: end; }
svg .grid { stroke: var(--grid); }
svg .axis { stroke: var(--other); }
svg .line { fill: none; stroke: var(--ours); stroke-width: 2; stroke-linejoin: round; }
svg .line.noise { stroke: var(--other); stroke-dasharray: 5 4; }
svg .line.head { stroke-width: 1; opacity: .35; }
svg .mark { fill: var(--ours); }
svg .mark.noise { fill: var(--card); stroke: var(--other); stroke-width: 1.5; }
svg .missing path { fill: none; stroke: var(--alt); stroke-width: 2; }
svg .bar { fill: var(--ours); }
svg .bar.other { fill: var(--other); }
svg .bar.alt { fill: var(--alt); }
.scroll { overflow-x: auto; margin-top: 20px; }
table {
  border-collapse: collapse; width: 100%; max-width: 980px; font-size: 15px; line-height: 1.45;
  font-variant-numeric: tabular-nums;
}
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13.5px; vertical-align: bottom; }
th, td { padding: 10px 20px 10px 0; border-bottom: 1px solid var(--rule); }
td { vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
td.n, th.n { text-align: right; }
td.n { white-space: nowrap; }
td strong { font-weight: 600; }
td .why { display: block; color: var(--soft); max-width: 46em; }
tr.total td { font-weight: 650; border-bottom: 0; }
ul { padding-left: 1.15em; max-width: 46em; }
li { margin-bottom: 9px; }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
footer {
  margin-top: 64px; padding-top: 20px; border-top: 1px solid var(--rule); color: var(--soft); font-size: 14px;
}
footer p { max-width: 60em; }
@media (max-width: 860px) { .strip { grid-template-columns: 1fr 1fr; } }
@media (max-width: 560px) {
  main { padding: 36px 18px 56px; }
  section { margin-top: 48px; }
  .lead { font-size: 17px; }
  .strip div { padding: 15px 14px 14px; }
  .strip dd { font-size: 23px; }
  figure { padding: 16px 14px; }
  svg text { font-size: 14px; }
  .panels svg text { font-size: 12px; }
  .scroll { overflow-x: visible; }
  table, tbody, tr, td { display: block; }
  thead { display: none; }
  tr { padding: 12px 0; border-bottom: 1px solid var(--rule); }
  td, td.n {
    display: flex; justify-content: space-between; gap: 16px; padding: 3px 0; border: 0; white-space: normal;
  }
  td::before { content: attr(data-column); flex: 0 0 44%; color: var(--soft); font-size: 13.5px; }
  td span { text-align: right; min-width: 0; overflow-wrap: anywhere; }
  td:first-child { display: block; font-weight: 600; }
  td:first-child::before { content: none; }
  td:first-child span { display: block; text-align: left; font-weight: inherit; }
  td .why { font-weight: 400; }
}
@media print {
  body { background: #fff; font-size: 11pt; }
  main { padding: 0; }
  figure, .strip, tr { break-inside: avoid; }
}
"""
