import DataTable from "DATATABLES";

const FEW = 5; // rows that need no search
const LONG = 100; // rows from which on a table has pages

// Numbers in their order, blanks last both ways.
const number = (cell) => (cell === "" ? NaN : Number(cell));
const order = (sign) => (a, b) => {
  const [x, y] = [number(a), number(b)];
  return Number.isNaN(x) ? (Number.isNaN(y) ? 0 : 1) : Number.isNaN(y) ? -1 : sign * (x - y);
};
DataTable.type("figure", "order", { asc: order(1), desc: order(-1) });

for (const table of document.querySelectorAll("table.data")) {
  const rows = table.tBodies[0].rows.length;
  const api = new DataTable(table, {
    order: [],
    autoWidth: false,
    paging: rows > LONG,
    pageLength: LONG / 2,
    columnDefs: [{ targets: "num", type: "figure" }],
    layout: {
      topStart: null,
      topEnd: null,
      top: rows > FEW ? { search: { text: "Search", placeholder: "" } } : null,
      bottomStart: { info: { empty: "No rows", text: "_TOTAL_ rows" } },
      bottomEnd: rows > LONG ? "paging" : null,
    },
    language: { infoFiltered: "of _MAX_", zeroRecords: "No row matches" },
  });
  const grid = table.closest(".grid");
  grid.querySelector(".controls").append(...grid.querySelectorAll(".dt-search"));
  for (const select of grid.querySelectorAll("select[data-column]")) {
    const column = api.column(Number(select.dataset.column));
    select.addEventListener("change", () => column.search(select.value, { exact: select.value !== "" }).draw());
  }
}

// The counts of verdicts filter the ledger.
const verdict = document.querySelector("#verdict");
const counts = [...document.querySelectorAll("[data-verdict]")];
const press = () => counts.forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.verdict === verdict.value)));
verdict?.addEventListener("change", press);
for (const button of counts) {
  button.addEventListener("click", () => {
    verdict.value = verdict.value === button.dataset.verdict ? "" : button.dataset.verdict;
    verdict.dispatchEvent(new Event("change"));
  });
}

// Figures are gzip in base64.
async function unpack(image) {
  const bytes = Uint8Array.from(atob(image.dataset.svg), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const drawing = new Blob([await new Response(stream).arrayBuffer()], { type: "image/svg+xml" });
  image.src = URL.createObjectURL(drawing);
  await image.decode();
}
// In claims that are closed, images are decoded once they are seen.
const figures = [...document.querySelectorAll("img[data-svg]")];
await Promise.allSettled(figures.map(unpack));

// Contents: closed where the window is narrow, and marking the section in view.
const contents = document.querySelector("body > nav details");
const narrow = matchMedia("(max-width: 70rem)");
const fold = () => (contents.open = !narrow.matches);
narrow.addEventListener("change", fold);
fold();
const links = new Map([...contents.querySelectorAll("a")].map((a) => [decodeURI(a.hash).slice(1), a]));
const seen = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) links.get(target.id)?.classList.toggle("here", isIntersecting);
  },
  { rootMargin: "-10% 0px -75% 0px" },
);
for (const section of document.querySelectorAll("main section[id]")) seen.observe(section);
contents.addEventListener("click", (event) => event.target.closest("a") && narrow.matches && (contents.open = false));
document.documentElement.dataset.ready = "true";
