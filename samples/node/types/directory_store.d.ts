/**
 * @param {string} directory
 * @returns {import('./core/bundle.js').Store}
 */
export function directoryStore(directory: string): import("./core/bundle.js").Store;
