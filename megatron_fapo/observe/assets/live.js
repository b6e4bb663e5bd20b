/* Served live: ask whether there is more; take it at once while the reader is above the rollouts, else offer it. */
(() => {
  const line = document.getElementById("live");
  const follow = document.createElement("input"), label = document.createElement("label");
  const words = document.createElement("span"), now = document.createElement("button");
  follow.type = "checkbox";
  follow.id = "follow";
  follow.checked = sessionStorage.getItem("follow") !== "no";
  follow.addEventListener("change", () => sessionStorage.setItem("follow", follow.checked ? "yes" : "no"));
  label.append(follow, " Follow the run");
  now.type = "button";
  now.id = "now";
  now.textContent = "Show the new steps";
  now.hidden = true;
  const load = () => location.reload();
  now.addEventListener("click", load);
  words.textContent = "Live. ";
  line.append(words, label, " ", now);

  function reading() {
    const below = document.getElementById("rollouts").getBoundingClientRect().top < window.innerHeight / 2;
    return below || document.querySelector("#browser :focus, #gantt :focus, figure :focus") !== null;
  }

  async function ask() {
    try {
      const version = await (await fetch("/version", { cache: "no-store" })).text();
      words.textContent = "Live. ";
      if (version === line.dataset.version) return;
      if (follow.checked && !reading()) load();
      else now.hidden = false;
    } catch {
      words.textContent = "The server of this page has ended. ";
    }
  }
  setInterval(ask, Number(line.dataset.seconds ?? 2) * 1000);
})();
