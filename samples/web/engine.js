/** Calls to the worker as promises. */

export class Engine {
  #worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
  #waiting = new Map();
  #next = 0;

  /** @param {(progress: {path: string, received: number, total: number | null}) => void} onProgress */
  constructor(onProgress) {
    this.#worker.addEventListener('message', ({ data: { id, progress, event, error, result } }) => {
      if (progress !== undefined) {
        onProgress(progress);
        return;
      }
      const { onEvent, resolve, reject } = this.#waiting.get(id);
      if (event !== undefined) {
        onEvent(event);
        return;
      }
      this.#waiting.delete(id);
      if (error === undefined) resolve(result);
      else reject(new Error(error));
    });
    this.#worker.addEventListener('error', (event) => {
      const reason = event.message || 'a file of the page is missing; run npm run vendor';
      for (const { reject } of this.#waiting.values()) reject(new Error(`the worker failed: ${reason}`));
      this.#waiting.clear();
    });
  }

  /**
   * Call one of the worker's methods.
   * @param {string} method
   * @param {object} [given]
   * @param {(event: any) => void} [onEvent] told of what comes before the result
   * @returns {Promise<any>}
   */
  call(method, given = {}, onEvent = () => undefined) {
    const id = this.#next++;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { onEvent, resolve, reject });
      this.#worker.postMessage({ id, method, given });
    });
  }
}
