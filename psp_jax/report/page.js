// A click on a heading of the class table sorts the rows by that column.
for (const head of document.querySelectorAll('.classes thead th')) {
  head.firstElementChild.addEventListener('click', () => {
    const before = head.getAttribute('aria-sort');
    const first = head.cellIndex < 2 ? 'ascending' : 'descending';  // the best class first
    const order = !before ? first : before === 'ascending' ? 'descending' : 'ascending';
    for (const other of head.parentNode.children) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', order);
    const sign = order === 'ascending' ? 1 : -1;
    const body = head.closest('table').tBodies[0];
    const compare = (a, b) => {
      [a, b] = [a, b].map(row => row.cells[head.cellIndex]);
      if (a.dataset.value === undefined)
        return sign * a.textContent.localeCompare(b.textContent, 'en', {numeric: true});
      if (a.dataset.value === '' || b.dataset.value === '')  // cells without a number come last
        return (a.dataset.value === '') - (b.dataset.value === '');
      return sign * (a.dataset.value - b.dataset.value);
    };
    body.append(...[...body.rows].sort(compare));
  });
}
