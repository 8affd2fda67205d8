"""How the page looks: on a laptop, on a phone, and on paper."""

PHONE = "(max-width: 640px)"

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#0072b2"/>'
    '<path d="M3 12V8h2v4zm4 0V4h2v8zm4 0V6h2v6z" fill="#fff"/></svg>'
)

STYLE = """
:root { --ink: #1c2330; --quiet: #5a6475; --line: #dde1e8; --pale: #f5f7fa; --link: #00558a; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 66rem; background: #fff; color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3.2rem 0 .8rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .3rem; }
p, dl { max-width: 46rem; }
p { margin: .5rem 0; }
a { color: var(--link); }
header p { color: var(--quiet); }
nav ol { columns: 2; column-gap: 2.5rem; max-width: 46rem; margin: 1.2rem 0 0; padding: 0 0 0 1.4rem; }
nav li { break-inside: avoid; padding: .1rem 0; }
code { font: .85em/1.5 ui-monospace, "SF Mono", Consolas, "Liberation Mono", monospace; background: var(--pale);
  padding: .1em .3em; border-radius: 3px; box-decoration-break: clone; -webkit-box-decoration-break: clone; }
dt { font-weight: 600; margin-top: .7rem; }
dd { margin: 0; color: var(--quiet); font-size: .9rem; }
.origin, figcaption span { color: var(--quiet); font-size: .875rem; }
.caveat { font-size: .875rem; padding: .3rem .8rem; border-left: 3px solid #d9a441; background: #fdf8ec; }
figure { margin: 1.8rem 0 2.2rem; }
figcaption { margin-bottom: .7rem; }
figcaption strong, figcaption span { display: block; }
figcaption span { margin-top: .15rem; }
figure img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; margin: 1.2rem 0 1.6rem; border-bottom: 1px solid var(--line); }
.scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.tall { max-height: 34rem; overflow-y: auto; }
.tall thead th { position: sticky; top: 0; background: #fff; box-shadow: 0 1px 0 var(--quiet); }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.4; min-width: 100%; overflow-wrap: normal; }
caption { caption-side: top; text-align: left; font-weight: 600; font-size: .95rem; padding: 0 0 .4rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(63rem, calc(100vw - 2rem)); }
th, td { padding: .32rem .9rem .32rem 0; vertical-align: top; text-align: left; }
th:last-child, td:last-child { padding-right: .2rem; }
thead th { font-weight: 600; color: var(--quiet); vertical-align: bottom; border-bottom: 1px solid var(--quiet); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody th { font-weight: 400; min-width: 9rem; max-width: 24rem; }
td.w { max-width: 20rem; min-width: 4.5rem; }
td.long { min-width: 13rem; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.n, .flat td, .flat tbody th { white-space: nowrap; max-width: none; }
.good { color: #11683c; }
.bad { color: #a3261c; font-weight: 600; }
@media (max-width: 640px) {
  body { padding: 1.2rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  h2 { font-size: 1.2rem; margin-top: 2.4rem; }
  nav ol { columns: 1; }
  table { font-size: .8rem; }
  td.w { max-width: 15rem; }
  tbody th { position: sticky; left: 0; background: #fff; min-width: 7rem; max-width: 9.5rem; padding-right: .6rem;
    white-space: normal; overflow-wrap: anywhere; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll, .tall { overflow: visible; max-height: none; }
  .tall thead th, tbody th, caption span { position: static; }
  table { font-size: 6.5pt; overflow-wrap: anywhere; }
  th, td { padding-right: .35rem; }
  th, tbody th, td.w, td.long { min-width: 0; }
  .flat td, .flat tbody th { white-space: normal; }
  figure, tr { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
  a { color: inherit; text-decoration: none; }
}
"""
