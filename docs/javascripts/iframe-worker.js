// Search on pages that are opened from a folder: browsers start no Worker from file://, so a hidden frame stands in for
// it. Material asks for `IFrameWorker` under this name and would load it from another host (mkdocs.yml, extra.polyfills).
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.frame = frame
      const inside = frame.contentWindow
      window.addEventListener("message", (event) => {
        if (event.source === inside) this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      })
      const start = `
        self.postMessage = (data) => parent.postMessage(data, "*")
        self.importScripts = async (...urls) => {
          for (const url of urls) await new Promise((loaded, failed) => {
            const script = Object.assign(document.createElement("script"), { src: url, onload: loaded, onerror: failed })
            document.body.append(script)
          })
        }`
      inside.document.open()
      inside.document.write(`<body><script>${start}<\/script><script src="${new URL(url, location.href)}"><\/script></body>`)
      inside.document.close()
      this.ready = new Promise((resolve) => inside.addEventListener("load", resolve, { once: true }))
    }

    postMessage(data) {
      const inside = this.frame.contentWindow
      this.ready.then(() => inside.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.remove()
    }
  }
  window.Worker = window.IFrameWorker
}
