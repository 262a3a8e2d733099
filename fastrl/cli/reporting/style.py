"""The page's looks, by day and by night, on paper and on a phone."""

_LIGHT = """
  --page: #f6f7f9; --card: #ffffff; --ink: #15181e; --soft: #525b69; --line: #d8dde5;
  --grid: #e9ecf1; --axis: #8b95a4; --warn: #b42318; --warn-page: #fef3f2; --warn-line: #fda29b;
  --code: #eef1f5; --up: #0b6b3a;
  --c0: #1d5fd1; --c1: #c2410c; --c2: #0f7a4f; --c3: #8b2fc9; --c4: #0e7490; --c5: #be185d;
  --c6: #85610a; --c7: #5b6472;
"""
_DARK = """
  --page: #0e1116; --card: #161b22; --ink: #e8ecf2; --soft: #a3adba; --line: #2b323c;
  --grid: #232a33; --axis: #6c7685; --warn: #ff8f85; --warn-page: #2b1614; --warn-line: #7a2e27;
  --code: #1f2630; --up: #56d68f;
  --c0: #6aa8ff; --c1: #ff9d5c; --c2: #4fd29a; --c3: #cf9bff; --c4: #4cc9e6; --c5: #ff86b8;
  --c6: #e6c04d; --c7: #a9b3c1;
"""
_COLORS = "".join(
    f".c{i} .raw,.c{i} .line,.c{i} .bar,.c{i} .mark{{stroke:var(--c{i})}}"
    f".c{i} .dot,.t{i}{{fill:var(--c{i});color:var(--c{i})}}\n"
    for i in range(8)
)
STYLE = (
    (
        ":root {" + _LIGHT + "}\n@media (prefers-color-scheme: dark) { :root {" + _DARK + "} }\n"
        "@media print { :root {" + _LIGHT + "--page: #fff; } }\n" + _COLORS
    )
    + """
.d1 .line { stroke-dasharray: 7 4; } .d2 .line { stroke-dasharray: 2 4; }
.d3 .line { stroke-dasharray: 9 4 2 4; }
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, footer { max-width: 1240px; margin: 0 auto; padding: 28px 24px; }
footer { padding-top: 0; color: var(--soft); font-size: .85rem; }
h1 { margin: 0 0 14px; font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.15;
  letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { margin: 44px 0 12px; font-size: 1.3rem; letter-spacing: -.01em; }
h3 { margin: 24px 0 10px; font-size: .95rem; color: var(--soft); font-weight: 600; }
h4 { margin: 0; font-size: .95rem; overflow-wrap: anywhere; }
p, dl, dd, ul, figure { margin: 0; padding: 0; } ul { list-style: none; }
.kicker { color: var(--soft); font-size: .85rem; font-weight: 600; margin-bottom: 2px; }
.note, .caption, .unit { color: var(--soft); font-size: .84rem; }
.note { margin: 10px 0; max-width: 80ch; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; font-size: .86em; }
code { background: var(--code); border-radius: 4px; padding: .1em .35em; overflow-wrap: anywhere; }
pre { background: var(--code); border-radius: 8px; padding: 14px 16px; overflow-x: auto;
  margin: 10px 0; line-height: 1.55; white-space: pre-wrap; overflow-wrap: anywhere; }
.facts { display: grid; gap: 10px 28px;
  grid-template-columns: repeat(auto-fit, minmax(185px, 1fr)); }
dt { color: var(--soft); font-size: .8rem; }
dd small { color: var(--soft); font-weight: 400; font-size: .8rem; white-space: nowrap; }
.facts dd { font-size: .95rem; font-weight: 550; overflow-wrap: anywhere; line-height: 1.35; }
.problems { margin-top: 22px; display: grid; gap: 8px; }
.problems li { display: flex; gap: 10px; align-items: flex-start; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px; font-size: .92rem; }
.problems .warn { background: var(--warn-page); border-color: var(--warn-line); }
.problems .sign { flex: none; width: 1.4em; height: 1.4em; border-radius: 50%; display: grid;
  place-items: center; font-size: .85em; margin-top: .15em; color: var(--soft);
  border: 1.5px solid currentColor; }
.problems .warn .sign, .warn strong { color: var(--warn); }
.hero { background: var(--card); border: 1px solid var(--line); border-radius: 14px;
  padding: 20px 24px; display: grid; gap: 4px 36px; grid-template-columns: 1fr minmax(260px, 380px);
  align-items: center; }
.hero .label { display: block; font-size: .85rem; color: var(--soft); letter-spacing: 0;
  font-weight: 600; }
.hero .big { font-size: clamp(1.9rem, 5vw, 2.7rem); font-weight: 700; letter-spacing: -.03em;
  line-height: 1.15; font-variant-numeric: tabular-nums; }
.from { color: var(--soft); font-weight: 500; } .hero .to { white-space: nowrap; }
.sentence { grid-row: 2; }
.dumbbell { grid-column: 2; grid-row: 1 / 3; width: 100%; }
.track { stroke: var(--grid); stroke-width: 2; } .dumbbell .bar { stroke-width: 3; }
.tiles { display: grid; gap: 10px; margin-top: 10px;
  grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 9px 14px; }
.tiles dd { font-weight: 600; font-variant-numeric: tabular-nums; }
.grid { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
figure { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 13px 14px 10px; break-inside: avoid; min-width: 0; }
figcaption { display: flex; justify-content: space-between; gap: 12px; margin-bottom: 6px; }
.unit { line-height: 1.3; }
.now { font-size: 1.15rem; font-weight: 650; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.caption { margin-top: 6px; line-height: 1.4; }
.plot { position: relative; } .plot svg { display: block; width: 100%; height: auto;
  overflow: visible; touch-action: pan-y; }
svg path { fill: none; } svg text { font-size: 11.5px; fill: var(--soft); }
path.grid { stroke: var(--grid); } path.axis { stroke: var(--axis); }
.tick { font-variant-numeric: tabular-nums; } .end { text-anchor: end; }
.mid { text-anchor: middle; }
.line { stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.raw { stroke-width: 1.1; stroke-opacity: .38; stroke-linejoin: round; stroke-linecap: round; }
.bar { stroke-width: 1.4; } .plot .bar { stroke-opacity: .75; }
path.mark { fill: var(--card); stroke-width: 1.8; }
svg text.letter { font-weight: 700; font-size: 12px; }
.alarm .at { stroke: var(--warn); stroke-width: 1.3; stroke-dasharray: 3 3; }
.alarm .sign { fill: var(--warn); } svg text.mark { fill: var(--card); font-weight: 800;
  font-size: 10px; }
svg text.alarm-name { fill: var(--warn); font-weight: 700; }
.rule { stroke: var(--axis); pointer-events: none; }
.tip { position: absolute; top: 18px; background: var(--ink); color: var(--page); font-size: .8rem;
  border-radius: 7px; padding: 5px 9px; white-space: pre; pointer-events: none; line-height: 1.4;
  font-variant-numeric: tabular-nums; z-index: 1; max-width: 100%; overflow: hidden; }
.legend, .keys { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .84rem;
  margin-top: 6px; }
.keys { font-size: .92rem; gap: 4px 22px; margin: 0 0 8px; }
.legend svg, .key svg { width: 30px; height: 10px; margin-right: 6px; vertical-align: middle; }
.key { white-space: nowrap; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th { text-align: left; } thead th { color: var(--soft); font-size: .8rem; font-weight: 600; }
th, td { padding: 9px 12px; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody th { font-weight: 550; } tbody tr:last-child > * { border-bottom: 0; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; } .wide td:not(.number) { overflow-wrap: anywhere; min-width: 7.5em; }
.wide thead th, .wide th code { white-space: nowrap; } .wide tbody th { min-width: 9em; }
.wide small { color: var(--soft); }
.wide .number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.samples { table-layout: fixed; background: var(--card); border-radius: 12px; margin-bottom: 22px;
  border-collapse: separate; border-spacing: 0; border: 1px solid var(--line); }
caption { text-align: left; font-weight: 600; padding: 6px 0 8px; font-size: .95rem;
  color: var(--soft); }
.pairs th:first-child { width: 30%; } .training th:first-child { width: 30%; }
.training th:last-child { width: 22%; } .samples tbody th { font-weight: 400; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.newline { color: var(--soft); font-size: .85em; user-select: none; }
.part, .reward { font-size: .8rem; color: var(--soft); font-weight: 600; }
.text + .part { margin-top: 8px; } .reward { font-variant-numeric: tabular-nums;
  margin-bottom: 2px; }
.none { color: var(--soft); font-style: italic; } .change { color: var(--ink);
  white-space: nowrap; }
.parts div { display: flex; justify-content: space-between; gap: 10px; }
.parts dt { overflow-wrap: anywhere; } .parts dd { font-variant-numeric: tabular-nums;
  font-weight: 550; }
details { margin: 10px 0; } summary { cursor: pointer; font-weight: 550; padding: 4px 0; }
td summary, th summary { font-size: .84rem; color: var(--soft); }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; border-radius: 4px; }
@media (max-width: 640px) {
  main, footer { padding: 20px 14px; } .facts { grid-template-columns: 1fr 1fr; gap: 10px 16px; }
  .hero { grid-template-columns: 1fr; padding: 16px; }
  .dumbbell { grid-column: 1; grid-row: 3; margin-top: 8px; }
  .tiles { grid-template-columns: 1fr 1fr; } .tiles div { padding: 8px 11px; }
  .samples thead { position: absolute; clip-path: inset(50%); }
  .samples, .samples tbody, .samples tr, .samples th, .samples td { display: block;
  width: auto !important; }
  .samples { border: 0; background: none; }
  .samples tr { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
    margin-bottom: 10px; } caption { display: block; }
  .samples tbody tr > * { border-bottom: 1px solid var(--grid); }
  .samples tbody tr > *::before { content: attr(data-head); font-size: .75rem; font-weight: 600;
    color: var(--soft); display: block; }
}
@media print {
  body { font-size: 10pt; } main { padding: 0; max-width: none; } .tip, .rule { display: none; }
  .grid { grid-template-columns: 1fr 1fr; } tr, .hero, .tiles div { break-inside: avoid; }
  h2, h3, .note, .keys { break-after: avoid; }
}
"""
)
