import assert from 'node:assert/strict'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, it } from 'node:test'
import { projectRoot } from '../checkout.mts'

describe('the README and docs/', () => {
  const docs = readdirSync(join(projectRoot, 'docs')).map((name) => join('docs', name))
  const pages = ['README.md', ...docs].filter((name) => name.endsWith('.md'))

  it('have no comments among commands to paste', () => {
    // In an interactive zsh, the shell of macOS, "make snapshot   # then …; make restore" runs both.
    for (const page of pages) {
      const text = readFileSync(join(projectRoot, page), 'utf8')
      const blocks = [...text.matchAll(/^```(?:bash|sh)\n([\s\S]*?)^```$/gm)]
      for (const [, commands = ''] of blocks) assert.doesNotMatch(commands, /(^|\s)#/, page)
    }
  })

  it('have links that lead somewhere', () => {
    // As GitHub makes the anchor of a heading.
    const anchor = (title: string) =>
      title
        .toLowerCase()
        .replace(/[^\w\- ]/g, '')
        .replaceAll(' ', '-')
    const read = (page: string) => readFileSync(join(projectRoot, page), 'utf8')
    const link = /\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)/g
    for (const page of pages) {
      for (const [found, path, part] of read(page).matchAll(link)) {
        const titles = read(path ? join(page, '..', path) : page).matchAll(/^#+ (.*)$/gm)
        const anchors = [...titles].map(([, title = '']) => anchor(title))
        if (part) assert.ok(anchors.includes(part), `${page}: ${found}`)
      }
    }
  })
})
