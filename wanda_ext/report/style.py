"""The style of report.html: one column on a phone, light and dark, no file beside it."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f7f8fa; --card: #ffffff; --ink: #16202c; --soft: #586575; --edge: #dce1e8;
  --good: #1a7f4b; --bad: #c0392b; --code: #eef1f5; --l0: #2563eb; --l1: #d9730d;
  --h0: #eef4fb; --h1: #d6e6f5; --h2: #b5d3ec; --h3: #8fbce0; --h4: #67a2d2; --h5: #4486c1;
  --h6: #2a69a9; --h7: #194e8a; --h8: #0f3566;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #10151c; --card: #19212b; --ink: #e6ebf1; --soft: #9aa8b8; --edge: #2d3947;
    --good: #4cc38a; --bad: #ff7b6b; --code: #11171f; --l0: #6ea8ff; --l1: #f5a254;
    --h0: #1e2a38; --h1: #20394f; --h2: #234b69; --h3: #285f86; --h4: #3276a4; --h5: #4690bf;
    --h6: #68abd5; --h7: #94c7e8; --h8: #c6e4f8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 36px 0 12px; } h3 { font-size: 1rem; margin: 16px 0 8px; }
p { margin: 8px 0; overflow-wrap: anywhere; }
.lead, .about, dt, th, .unit { color: var(--soft); }
.about { font-size: .875rem; }
.sideways { display: none; color: var(--soft); font-size: .875rem; }
.pair { display: grid; gap: 0 14px; grid-template-columns: 1fr 1fr; }
.text { white-space: pre-wrap; }
.good { color: var(--good); } .bad { color: var(--bad); }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr));
  margin: 20px 0 0; }
.cards div, figure, .box {
  background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 14px 16px;
}
.cards dt { font-size: .8rem; } .cards dd { margin: 0; }
.cards .big { font-size: 1.45rem; font-weight: 650; line-height: 1.3; overflow-wrap: anywhere; }
.cards .unit { font-size: .85rem; }
figure { margin: 0 0 14px; container-type: inline-size; }
figcaption { font-weight: 600; margin-bottom: 8px; }
.scroll { overflow-x: auto; }
.scroll::-webkit-scrollbar { height: 8px; } /* always there, on a phone too */
.scroll::-webkit-scrollbar-track { background: var(--edge); border-radius: 4px; }
.scroll::-webkit-scrollbar-thumb { background: var(--soft); border-radius: 4px; }
.scroll:focus-visible { outline: 2px solid var(--l0); }
.box { margin: 0 0 14px; } .box.scroll { padding: 4px 0; }
svg { display: block; width: 100%; min-width: 800px; height: auto; }
svg text { font-size: 12px; fill: var(--soft); } .end { text-anchor: end; }
.mid { text-anchor: middle; } .grid { stroke: var(--edge); }
polyline { fill: none; stroke-width: 2; } polyline.l0 { stroke: var(--l0); }
polyline.l1 { stroke: var(--l1); stroke-dasharray: 6 4; }
circle.l0, .k0 { fill: var(--l0); } circle.l1, .k1 { fill: var(--l1); }
.h0 { fill: var(--h0); } .h1 { fill: var(--h1); } .h2 { fill: var(--h2); } .h3 { fill: var(--h3); }
.h4 { fill: var(--h4); } .h5 { fill: var(--h5); } .h6 { fill: var(--h6); } .h7 { fill: var(--h7); }
.h8 { fill: var(--h8); }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px; border-bottom: 1px solid var(--edge);
  white-space: nowrap; }
tr:last-child > * { border-bottom: 0; } th { font-weight: 600; }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; }
.n { text-align: right; } summary { cursor: pointer; padding: 8px 0; }
pre { background: var(--code); border: 1px solid var(--edge); border-radius: 8px;
  margin: 0; padding: 12px 14px; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .85rem; user-select: all; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, monospace; }
@container (max-width: 799px) { .sideways { display: block; } } /* narrower than an svg */
@media (max-width: 600px) {
  .pair { grid-template-columns: 1fr; }
  main { padding: 20px 12px 40px; } .cards { grid-template-columns: 1fr 1fr; gap: 8px; }
  .cards .big { font-size: 1.15rem; } h1 { font-size: 1.3rem; }
  .cards div, figure, .box { padding: 10px 12px; } .box.scroll { padding: 2px 0; }
  th, td { padding: 5px 10px; }
}
@media print { .scroll { overflow: visible; } body { background: #fff; } }
"""
