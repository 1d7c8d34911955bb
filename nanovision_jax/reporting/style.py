"""The style sheet of reports: for paper and for screens of 360 pixels and more, light and dark."""

STYLE = """
:root { color-scheme: light; --page: #fff; --ink: #1b1b1b; --soft: #595959; --line: #e6e6e3; --rule: #999;
  --box: #f5f5f3; --track: #e9e9e6; --share: #6f9fca; --wrong: #a3281e; --heat: #6f9fca; --bad: #dc8a6a;
  --c0: #2a5d8c; --c1: #c05a15; --c2: #2f7d4f; --c3: #8b4a8f; --c4: #8a6d00; --c5: #5f6b74 }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --page: #17191b; --ink: #e6e4df;
  --soft: #a4a5a3; --line: #303335; --rule: #6d7072; --box: #202325; --track: #303335; --share: #4f80ad;
  --wrong: #ef8a7c; --heat: #3f6f9c; --bad: #a5533a;
  --c0: #7fb2e0; --c1: #f0954f; --c2: #7cc796; --c3: #cf97d3; --c4: #d3b44a; --c5: #a9b4bc } }
* { box-sizing: border-box }
body { max-width: 50rem; margin: 0 auto; padding: 2.5rem 1.2rem 4rem; background: var(--page); color: var(--ink);
  font: 1.05rem/1.55 Charter, 'Iowan Old Style', Georgia, 'Liberation Serif', serif; overflow-wrap: anywhere }
h1 { font-size: 2.3rem; line-height: 1.1; margin: 0 } .day { color: var(--soft); margin: .3rem 0 1.6rem }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 2.8rem 0 .6rem } p { margin: .6rem 0 }
h3 { font-size: 1rem; line-height: 1.3; margin: 1.6rem 0 .4rem } h2, h3 { break-after: avoid }
.lead { font-size: 1.2rem; line-height: 1.5 } .verdict { border-left: 3px solid var(--c0); padding-left: .8rem }
.note, .legend, table, figure, pre, svg { font-family: system-ui, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif }
.note { font-size: .8rem; line-height: 1.45; color: var(--soft) } .scroll { overflow-x: auto; margin: 1rem 0 }

table { border-collapse: collapse; font-size: .85rem; line-height: 1.35; font-variant-numeric: tabular-nums;
  border-bottom: 1px solid var(--rule); min-width: 60%; break-inside: avoid; overflow-wrap: normal }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; vertical-align: top }
th:last-child, td:last-child { padding-right: 0 }
th:first-child, td:first-child, .words th, .words td { text-align: left }
td { white-space: nowrap } td:first-child { white-space: normal; min-width: 6.5rem }
.words { min-width: 44rem } .words td:not(:last-child) { white-space: normal }
th { font-weight: 600; border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule) }
.bar { vertical-align: -1px } .track { fill: var(--track) } .share { fill: var(--share) }
.mark { fill: var(--ink); stroke: var(--ink); stroke-width: 0 } path.mark { stroke-width: 1; fill: none }
.confusions { display: flex; flex-wrap: wrap; gap: .4rem 2rem; align-items: start }
.confusions .scroll { max-width: 100%; margin: .4rem 0 }
.confusion { border: 0; min-width: 0; font-size: .75rem } .confusion th { font-weight: 400; border: 0 }
.confusion tr:first-child th:first-child { font-weight: 600 } .confusion :is(th, td) { padding: .25rem .45rem }
.confusion td { text-align: center; min-width: 2.2rem } .confusion th:not(:first-child) { text-align: center }
.confusion .right { background: color-mix(in srgb, var(--heat) var(--share), transparent) }
.confusion .wrong { color: inherit; background: color-mix(in srgb, var(--bad) var(--share), transparent) }

.charts, .cards { display: grid; gap: 1.4rem; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)) }
.charts.small { gap: .8rem 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(13.5rem, 100%), 1fr)) }
.cards { grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)) } figure { margin: 0; break-inside: avoid }
figcaption { font-size: .85rem; line-height: 1.4 } figcaption p { margin: .35rem 0 0 }
.charts.small figcaption { font-size: .8rem; color: var(--soft) }
.chart, .tree { display: block; width: 100%; overflow: visible } .tree { max-width: 27rem; margin: 1rem 0 }
.chart text { font-size: 10.5px; fill: var(--soft); font-variant-numeric: tabular-nums }
.grid { stroke: var(--line) } .axis { stroke: var(--rule) }
polyline { fill: none; stroke-width: 1.4; stroke-linejoin: round } .dots { stroke: var(--page) }
.at rect { fill: transparent } .at path { stroke: var(--rule) }
.at path, .at text { visibility: hidden; pointer-events: none }
.at:hover :is(path, text) { visibility: visible }
.at text { paint-order: stroke; stroke: var(--page); stroke-width: 4px }
.key { white-space: nowrap; margin-right: .7rem } .key::before { content: ''; display: inline-block; width: .9em;
  margin: 0 .35em .22em 0; border-top: .2em solid } .legend { font-size: .85rem }
.tree path { fill: none; stroke: var(--rule); stroke-width: 1.5 } .tree circle { fill: var(--c0); stroke: var(--page);
  stroke-width: 1.5 } .tree .root { fill: var(--page); stroke: var(--rule) } .tree text { font-size: 11.5px;
  fill: var(--soft) } .tree .name { font-size: 13.5px; font-weight: 600; fill: var(--ink) }

img { width: 128px; height: 128px; object-fit: contain; display: block; background: var(--box) }
.cards .small, .picture img { image-rendering: pixelated } .kind { font-size: .75rem }
.kind, .asked { color: var(--soft) } p.wrong { color: var(--wrong) }
.patches { display: flex; flex-wrap: wrap; gap: 1rem 1.6rem; align-items: start } .patches .scroll { margin: 0 }
.patches { max-width: 100% } .patches > * { max-width: 100% } .patches td { text-align: left; min-width: 4.5rem }
.picture { position: relative; width: 224px } .picture :is(img, svg) { width: 224px; height: 224px; display: block }
.picture svg { position: absolute; inset: 0 } .picture path { stroke: #fff; stroke-width: .015;
  opacity: .75 }
small { color: var(--soft) }
pre { font: .75rem/1.6 ui-monospace, Menlo, 'Liberation Mono', monospace; white-space: pre-wrap; padding: .8rem 1rem;
  overflow-wrap: anywhere; background: var(--box) } pre span { display: inline-block; max-width: 100% }
@media (max-width: 30rem) { body { padding: 1.5rem .9rem 3rem } h1 { font-size: 1.8rem }
  .lead { font-size: 1.1rem } }
@media print { body { max-width: none; padding: 0; font-size: 10pt } .scroll { overflow: visible } }
""" + '\n'.join(
    f'.s{i} {{ stroke: var(--c{i}) }} .f{i} {{ fill: var(--c{i}) }} .chart .f{i} {{ fill: var(--c{i}) }} '
    f'.k{i}::before {{ color: var(--c{i}) }}'
    for i in range(6)
)
