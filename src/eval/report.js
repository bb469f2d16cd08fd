for (const heading of document.querySelectorAll(".sortable th")) {
  heading.addEventListener("click", () => {
    const table = heading.closest("table"), body = table.tBodies[0], column = heading.cellIndex;
    const order = heading.dataset.order === "-1" ? 1 : -1;
    for (const other of table.querySelectorAll("th")) delete other.dataset.order;
    heading.dataset.order = order;
    const key = row => row.cells[column].textContent;
    const number = text => text === "–" ? -Infinity : Number(text);
    const compare = (a, b) => column === 0 ? key(a).localeCompare(key(b)) : number(key(a)) - number(key(b));
    for (const row of [...body.rows].sort((a, b) => order * compare(a, b) || 0)) body.append(row);
  });
}
